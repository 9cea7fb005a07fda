//! The same as text for Prometheus: for the node exporter's textfile collector, and for the server.

use std::fmt::{Display, Write};

use super::report::kms_answers;
use super::{Attempt, Report, SiteReport, TenantReport, VmReport};

/// A metric with its values so far.
struct Family {
    name: &'static str,
    help: &'static str,
    lines: String,
}

/// All metrics in the making, in the order in which they were named first.
#[derive(Default)]
struct Families(Vec<Family>);

impl Families {
    fn add(&mut self, name: &'static str, help: &'static str, labels: &[(&str, &str)], value: impl Display) {
        let at = self.0.iter().position(|family| family.name == name).unwrap_or_else(|| {
            self.0.push(Family { name, help, lines: String::new() });
            self.0.len() - 1
        });
        let labels: Vec<_> = labels.iter().map(|(name, value)| format!("{name}=\"{}\"", escape(value))).collect();
        let labels = if labels.is_empty() { String::new() } else { format!("{{{}}}", labels.join(",")) };
        // To a string, which takes everything.
        let _ = writeln!(self.0[at].lines, "{name}{labels} {value}");
    }

    fn text(self) -> String {
        let family = |Family { name, help, lines }| format!("# HELP {name} {help}\n# TYPE {name} gauge\n{lines}");
        self.0.into_iter().map(family).collect()
    }
}

/// A label's value as the format wants it.
fn escape(value: &str) -> String {
    value.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n")
}

fn seconds(time: reseal_format::time::Timestamp) -> f64 {
    time.0 as f64 / 1000.0
}

/// The metrics of a report. Every name begins with `reseal_`; all are gauges.
pub fn text(report: &Report) -> String {
    let mut families = Families::default();
    families.add("reseal_status", "Exit status of reseal status: 0 if all is right.", &[], {
        report.status().map_or(0, |status| status as u8)
    });
    families.add("reseal_status_timestamp_seconds", "When this was found out.", &[], seconds(report.time));
    report.tenants.iter().for_each(|report| tenant(&mut families, report));
    report.site.iter().for_each(|report| site(&mut families, report));
    families.text()
}

fn tenant(families: &mut Families, report: &TenantReport) {
    let labels = &[("tenant", report.tenant.as_str())];
    if report.erased.is_none() {
        let open = u8::from(report.closed.is_none());
        families.add("reseal_tenant_open", "Whether the tenant could be opened.", labels, open);
    }
    if let Some(answers) = kms_answers(report) {
        families.add("reseal_kms_up", "Whether the tenant's KMS gives its keys.", labels, u8::from(answers));
    }
    families.add(
        "reseal_tenant_used_bytes",
        "Bytes of the tenant's packs, which its quota counts.",
        labels,
        report.used,
    );
    families.add("reseal_tenant_bytes", "Bytes of all its objects.", labels, report.bytes);
    families.add("reseal_tenant_restore_points", "Restore points that were not forgotten.", labels, report.points);
    families.add("reseal_tenant_vms", "VMs that are known.", labels, report.vms.len());
    if let Some(quota) = report.quota {
        families.add("reseal_tenant_quota_bytes", "Bytes that its packs may have.", labels, quota);
    }
    if let Some(verdict) = &report.verified {
        let help = "When everything was verified last.";
        families.add("reseal_tenant_verify_timestamp_seconds", help, labels, seconds(verdict.time));
        let help = "Damaged objects that the last verification of everything found.";
        families.add("reseal_tenant_damaged_objects", help, labels, verdict.damaged);
    }
    report.vms.iter().for_each(|report| vm(families, labels[0], report));
}

fn vm(families: &mut Families, tenant: (&str, &str), report: &VmReport) {
    let labels = &[tenant, ("vm", report.vm.as_str())];
    families.add("reseal_restore_points", "Restore points of the VM that were not forgotten.", labels, report.points);
    age(families, labels, report.newest.map(|newest| newest.age), report.objective, report.late);
    if let Some(newest) = report.newest {
        let help = "When the newest restore point was made.";
        families.add("reseal_restore_point_timestamp_seconds", help, labels, seconds(newest.created));
        families.add("reseal_restore_point_number", "Number of the newest restore point.", labels, newest.number);
        let help = "Bytes that the backup of the newest restore point read.";
        families.add("reseal_restore_point_read_bytes", help, labels, newest.read);
        let help = "Bytes that the backup of the newest restore point stored.";
        families.add("reseal_restore_point_stored_bytes", help, labels, newest.stored);
    }
    last(families, labels, report.last.as_ref());
    if let Some(verdict) = &report.verified {
        families.add(
            "reseal_verify_timestamp_seconds",
            "When the VM was verified last.",
            labels,
            seconds(verdict.time),
        );
        let help = "Whether the last verification found damage that hurts the VM.";
        families.add("reseal_verify_damaged", help, labels, u8::from(verdict.damaged > 0));
    }
    if let Some(booted) = &report.boot {
        let help = "Whether the last boot that was checked passed.";
        families.add("reseal_boot_check_passed", help, labels, u8::from(booted.verdict.passed));
        let help = "When a boot was checked last.";
        families.add("reseal_boot_check_timestamp_seconds", help, labels, seconds(booted.time));
        let help = "Number of the restore point whose boot was checked last.";
        families.add("reseal_boot_check_restore_point_number", help, labels, booted.number);
        let help = "How long the last boot that was checked took.";
        let took = booted.verdict.took_ms as f64 / 1000.0;
        families.add("reseal_boot_check_duration_seconds", help, labels, took);
    }
}

fn age(families: &mut Families, labels: &[(&str, &str)], age: Option<u64>, objective: Option<u64>, late: bool) {
    if let Some(age) = age {
        families.add("reseal_restore_point_age_seconds", "Age of the newest restore point.", labels, age);
    }
    if let Some(objective) = objective {
        let help = "Age that the newest restore point may have.";
        families.add("reseal_restore_point_objective_seconds", help, labels, objective);
        let help = "Whether the newest restore point is older than it may be, or missing.";
        families.add("reseal_restore_point_late", help, labels, u8::from(late));
    }
}

fn last(families: &mut Families, labels: &[(&str, &str)], last: Option<&Attempt>) {
    let Some(last) = last else { return };
    families.add("reseal_last_result", "Exit status of the last backup: 0 if it was done.", labels, last.status);
    let help = "When the last backup ended.";
    families.add("reseal_last_result_timestamp_seconds", help, labels, seconds(last.time));
    let duration = last.duration_ms as f64 / 1000.0;
    families.add("reseal_last_result_duration_seconds", "How long the last backup took.", labels, duration);
}

fn site(families: &mut Families, report: &SiteReport) {
    let of_site = &[("server", report.address.as_str()), ("tenant", report.tenant.as_str())];
    let up = u8::from(report.server.is_ok());
    families.add("reseal_server_up", "Whether the server answers, and takes the certificate.", of_site, up);
    let end = seconds(report.certificate.expires);
    families.add("reseal_certificate_expiry_timestamp_seconds", "When this site's certificate expires.", of_site, end);
    for report in &report.vms {
        let labels = &[of_site[0], of_site[1], ("vm", report.vm.as_str())];
        age(families, labels, report.age, report.objective, report.late);
        last(families, labels, report.last.as_ref());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labels_are_escaped_and_a_metric_is_described_once() {
        let mut families = Families::default();
        families.add("reseal_a", "A.", &[("vm", "a\"b\\c")], 1);
        families.add("reseal_b", "B.", &[], 2.5);
        families.add("reseal_a", "A.", &[("vm", "d\ne")], 3);
        let text = "# HELP reseal_a A.\n# TYPE reseal_a gauge\nreseal_a{vm=\"a\\\"b\\\\c\"} 1\nreseal_a{vm=\"d\\ne\"} 3\n\
                    # HELP reseal_b B.\n# TYPE reseal_b gauge\nreseal_b 2.5\n";
        assert_eq!(families.text(), text);
    }
}
