//! Verdicts of boots are kept in the vault and shown, the latest of each restore point, at the cost of one note.
#![allow(clippy::unwrap_used)] // helpers of tests end where they meet what they did not expect

use std::fs;
use std::path::PathBuf;
use std::sync::Arc;
use std::thread::sleep;
use std::time::Duration;

use reseal_format::boot_reads::{BootReads, DiskReads};
use reseal_format::names::DiskName;
use reseal_format::verdict_note::{BootVerdict, Expectation};
use reseal_tests::faults::{Operation, Watched};
use reseal_tests::library::vm;
use reseal_tests::random::Random;
use reseal_tests::site::Site;
use reseal_vault::Tenant;
use reseal_writer::status::{Report, TenantReport, metrics};
use serde_json::{Value, json};

const MIB: usize = 1 << 20;

fn site(points: usize) -> Site {
    let site = Site::new();
    let path: PathBuf = site.disk("disk.raw");
    for seed in 0..points as u64 {
        fs::write(&path, Random::new(seed).bytes(MIB)).unwrap();
        site.backup("web", &path);
    }
    site
}

fn verdict(reason: Option<&str>) -> BootVerdict {
    BootVerdict {
        passed: reason.is_none(),
        expected: Expectation::Console("login:".into()),
        took_ms: 31_000,
        reason: reason.map(str::to_owned),
        program: "reseal 0.1.0".into(),
    }
}

/// Keeps a verdict; the key of its object. Each is of a moment of its own.
fn note(tenant: &Tenant, number: u32, reason: Option<&str>) -> String {
    sleep(Duration::from_millis(2));
    let point = tenant.point(&vm("web"), number).unwrap().manifest;
    let id = tenant.note_boot(&point, &verdict(reason)).unwrap();
    format!("tenants/default/vms/web/notes/{number:08}-{id}.note")
}

fn listed(site: &Site) -> Vec<Value> {
    let said = site.reseal(["list", "--json"]).ok().stdout;
    said.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

fn status_of(report: &Value) -> Value {
    report["tenants"][0]["vms"][0]["boot"].clone()
}

#[test]
fn the_latest_verdict_of_a_point_is_shown_and_that_of_the_vm_counts() {
    let site = site(2);
    let tenant = site.tenant();
    assert_eq!(listed(&site).iter().map(|point| point["boot"].clone()).collect::<Vec<_>>(), [Value::Null, Value::Null]);
    assert_eq!(status_of(&site.reseal(["status", "--json"]).ok().json()), Value::Null);

    note(&tenant, 1, Some("the guest switched itself off"));
    note(&tenant, 1, None);
    note(&tenant, 2, Some("its console did not show \"login:\" within 5 min 0 s"));
    let boots: Vec<Value> = listed(&site).iter().map(|point| point["boot"].clone()).collect();
    assert_eq!(
        (&boots[0]["passed"], &boots[0]["reason"], &boots[0]["took_ms"]),
        (&json!(true), &Value::Null, &json!(31_000))
    );
    assert_eq!(
        (&boots[1]["passed"], &boots[1]["number"], &boots[1]["expected"]),
        (&json!(false), &json!(2), &json!("console:login:"))
    );
    let said = site.reseal(["list"]).ok().stdout;
    assert!(
        said.lines().next().unwrap().ends_with("BOOT") && said.contains("  passed 20") && said.contains("  FAILED 20"),
        "{said}"
    );
    let said = site.reseal(["show", "web@2"]).ok().stdout;
    assert!(said.contains("waited for console:login:, 31.0 s: its console did not show"), "{said}");
    assert_eq!(site.reseal(["show", "web@1", "--json"]).ok().json()["boot"], boots[0]);

    // The newest check counts, whichever point it is of.
    let failed = site
        .reseal(["status", "--json"])
        .fails(1, &["web@2 did not boot when that was checked", "did not show"])
        .json();
    let boot = status_of(&failed);
    assert_eq!((&boot["number"], &boot["passed"]), (&json!(2), &json!(false)));
    assert!(boot["age"].as_u64().unwrap() < 600, "{boot}");
    let said = site.reseal(["status"]).expect(&[1]).stdout;
    assert!(said.contains("FAILED of 2, "), "{said}");
    let text = site.reseal(["status", "--metrics"]).expect(&[1]).stdout;
    assert!(text.contains("reseal_boot_check_passed{tenant=\"default\",vm=\"web\"} 0\n"), "{text}");
    assert!(text.contains("reseal_boot_check_restore_point_number{tenant=\"default\",vm=\"web\"} 2\n"), "{text}");
    note(&tenant, 1, None);
    assert_eq!(status_of(&site.reseal(["status", "--json"]).ok().json())["number"], 1);
}

#[test]
fn verdicts_and_reads_outlive_new_data_keys_and_damage_is_named() {
    let site = site(1);
    let tenant = site.tenant();
    let point = tenant.point(&vm("web"), 1).unwrap().manifest;
    let reads =
        BootReads { disks: vec![DiskReads { disk: DiskName::new("disk-0").unwrap(), clusters: vec![3, 1, 2] }] };
    tenant.note_boot_reads(&point, &reads).unwrap();
    let old = note(&tenant, 1, Some("it hung"));
    let key = note(&tenant, 1, None);
    site.reseal(["rekey", "--data", "--no-recovery"]).ok();
    assert_eq!(listed(&site)[0]["boot"]["passed"], json!(true));
    assert_eq!(site.tenant().boot_reads(&point).unwrap(), Some(reads));
    site.verify();

    let path = site.vault.join(&key);
    let mut bytes = fs::read(&path).unwrap();
    bytes[200] ^= 1;
    fs::write(&path, &bytes).unwrap();
    let damaged = site.reseal(["list", "--json"]).fails(3, &[&key, "failed authentication"]);
    assert_eq!(damaged.json()["number"], 1, "the point is listed all the same");
    let damaged = site.reseal(["show", "web@1"]).fails(3, &[&key]);
    assert!(damaged.stdout.contains("point       web@1"), "{damaged:#?}");
    let report = site.reseal(["status", "--json"]).fails(3, &[&key]).json();
    assert_eq!(report["tenants"][0]["vms"][0]["newest"]["number"], 1);
    // An older verdict under the name of the newer, and one whose name says another time, are found out.
    fs::copy(site.vault.join(&old), &path).unwrap();
    site.reseal(["list"]).fails(3, &[&key, "another note"]);
    let run = site.reseal(["verify"]).expect(&[3]);
    assert!(run.stdout.contains(&key), "{run:#?}");
}

#[test]
fn however_many_notes_there_are_a_status_opens_one() {
    let site = site(2);
    let tenant = site.tenant();
    let cost = || {
        let watched = Arc::new(Watched::new(site.store()));
        let tenant = site.tenant_in(watched.clone()).unwrap();
        watched.take_log();
        let report = TenantReport::of(&tenant, &site.heads(&tenant), &site.state, Report::of_vault().time).unwrap();
        (watched.take_log(), report)
    };
    let (without, _) = cost();
    for nth in 0..10 {
        note(&tenant, 1 + nth % 2, None);
    }
    let (with, report) = cost();
    let of =
        |operation: Operation, log: &[(Operation, String)]| log.iter().filter(|(found, _)| *found == operation).count();
    assert_eq!(of(Operation::List, &with), of(Operation::List, &without), "{with:#?}");
    assert_eq!(of(Operation::Get, &with), of(Operation::Get, &without) + 1, "{with:#?}");
    let mut whole = Report::of_vault();
    whole.tenants.push(report);
    assert!(metrics::text(&whole).contains("reseal_boot_check_passed{tenant=\"default\",vm=\"web\"} 1\n"));
}
