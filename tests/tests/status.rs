//! How things stand: late points, failed backups, known damage, a KMS that is down, certificates; and what it costs to ask.
#![allow(clippy::unwrap_used)] // helpers of tests end where they meet what they did not expect

mod servers;

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread::sleep;
use std::time::Duration;

use rcgen::date_time_ymd;
use reseal_format::names::TenantName;
use reseal_format::time::Timestamp;
use reseal_kms::Keyring;
use reseal_tests::faults::Watched;
use reseal_tests::library::backup as library_backup;
use reseal_tests::process::Run;
use reseal_tests::random::Random;
use reseal_tests::remote::{Authority, Sites};
use reseal_tests::site::Site;
use reseal_vault::{Record, random_master};
use reseal_writer::status::{Report, TenantReport, metrics};
use serde_json::{Value, json};

use servers::Config;
use servers::bao::Bao;

const MIB: usize = 1 << 20;

fn disk(site: &Site, name: &str, seed: u64) -> PathBuf {
    let path = site.disk(name);
    fs::write(&path, Random::new(seed).bytes(MIB)).unwrap();
    path
}

fn status(site: &Site, more: &[&str]) -> Run {
    site.reseal([&["status", "--json"], more].concat())
}

/// What it says of one VM of the only tenant.
#[track_caller]
fn vm(report: &Value, name: &str) -> Value {
    let vms = report["tenants"][0]["vms"].as_array().unwrap();
    vms.iter().find(|vm| vm["vm"] == name).unwrap_or_else(|| panic!("no {name}: {report:#}")).clone()
}

fn set(site: &Site, words: &[&str]) {
    site.reseal([&["tenant", "set", "default"], words].concat()).ok();
}

#[test]
fn a_point_that_is_older_than_its_objective_is_late() {
    let site = Site::new();
    let path = disk(&site, "disk.raw", 1);
    let before = status(&site, &[]).ok().json();
    assert_eq!((&before["status"], &before["tenants"][0]["vms"]), (&json!(0), &json!([])));
    for vm in ["web", "db", "old"] {
        site.backup(vm, &path);
    }
    let plain = status(&site, &[]).ok().json();
    let web = vm(&plain, "web");
    assert_eq!((&web["newest"]["number"], &web["objective"], &web["late"]), (&json!(1), &Value::Null, &json!(false)));
    assert_eq!((&web["last"]["status"], &web["last"]["number"]), (&json!(0), &json!(1)));
    assert_eq!(web["newest"]["read"], MIB as u64);
    let tenant = &plain["tenants"][0];
    assert_eq!((&tenant["kms_answers"], &tenant["points"], &tenant["opened"]), (&json!(true), &json!(3), &json!(true)));
    let listed = site.reseal(["tenant", "list", "--json"]).ok().json();
    assert_eq!((&tenant["used"], &tenant["bytes"]), (&listed["used"], &listed["bytes"]));

    set(&site, &["--objective", "1s"]);
    set(&site, &["--vm", "db", "--objective", "2h"]);
    set(&site, &["--vm", "old", "--no-objective"]);
    set(&site, &["--vm", "never", "--objective", "1d"]);
    sleep(Duration::from_millis(2100));
    let late = status(&site, &[]).fails(1, &["2 things are not as they should be"]).json();
    let of = |name: &str| (vm(&late, name)["objective"].clone(), vm(&late, name)["late"].clone());
    assert_eq!(of("web"), (json!(1), json!(true)));
    assert_eq!(of("db"), (json!(7200), json!(false)));
    assert_eq!(of("old"), (Value::Null, json!(false)));
    assert_eq!(of("never"), (json!(86_400), json!(true)));
    assert!(vm(&late, "web")["newest"]["age"].as_u64().unwrap() >= 2);
    let said = site.reseal(["status"]).expect(&[1]).stdout;
    assert!(
        said.contains("ATTENTION    tenant default: never is late: it has no restore point, its objective is 1d"),
        "{said}"
    );
    assert!(said.contains("web is late: its newest restore point is"), "{said}");
    site.reseal(["status", "web"]).fails(1, &["web is late"]);
    site.reseal(["status", "db"]).ok();
    site.reseal(["status", "nobody"]).fails(1, &["no VM nobody"]);

    // Its own objective goes, and the tenant's holds again; then neither does.
    set(&site, &["--vm", "never", "--objective", "tenant"]);
    set(&site, &["--vm", "old", "--objective", "tenant"]);
    let inherited = status(&site, &[]).expect(&[1]).json();
    assert_eq!(vm(&inherited, "old")["objective"], 1);
    assert!(!inherited["tenants"][0]["vms"].to_string().contains("never"), "{inherited:#}");
    set(&site, &["--no-objective"]);
    status(&site, &[]).ok();
}

#[test]
fn objectives_are_sealed_move_with_the_tenant_and_are_checked() {
    let site = Site::new();
    set(&site, &["--objective", "24h"]);
    set(&site, &["--vm", "web", "--objective", "90m"]);
    let show = || site.reseal(["tenant", "show", "--json"]).ok().json();
    let told = |shown: &Value| (shown["objective"].clone(), shown["vm_objectives"].clone());
    let both = (json!(86_400), json!({ "web": 5_400 }));
    assert_eq!(told(&show()), both);
    set(&site, &["--quota", "1G"]);
    site.reseal(["rekey", "--kek"]).ok();
    site.backup("web", &disk(&site, "disk.raw", 1));
    site.reseal(["rekey", "--data", "--no-recovery"]).ok();
    assert_eq!(told(&show()), both);
    assert_eq!(show()["quota"], 1 << 30);
    let record = site.tenant_folder().join("tenant.json");
    let text = fs::read_to_string(&record).unwrap();
    assert!(!text.contains("objective"), "{text}");
    fs::write(&record, text.replacen('{', "{\n  \"objective\": 1,", 1)).unwrap();
    assert_eq!(told(&show()), both, "a field in clear is nobody's objective");
    fs::write(&record, text).unwrap();
    for wrong in [
        &["--objective", "24"][..],
        &["--objective", "0h"],
        &["--objective", "tenant"],
        &["--objective", "1h", "--no-objective"],
        &["--quota", "1G", "--vm", "web"],
        &["--vm", "web"],
        &["--vm", "a/b", "--no-objective"],
    ] {
        site.reseal([&["tenant", "set", "default"], wrong].concat()).expect(&[2]);
    }
    assert_eq!(told(&show()), both);
}

#[test]
fn a_backup_that_failed_shows_until_one_is_done() {
    let site = Site::new();
    let path = disk(&site, "disk.raw", 1);
    site.backup("web", &path);
    site.reseal(["backup", "web", site.disk("no-such.raw").to_str().unwrap()]).expect(&[1]);
    let failed = status(&site, &[]).fails(1, &["the last backup of web made nothing", "no-such.raw"]).json();
    let last = &vm(&failed, "web")["last"];
    assert!(last["status"] == 1 && last["message"].as_str().unwrap().contains("no-such.raw"), "{failed:#}");
    assert_eq!(vm(&failed, "web")["newest"]["number"], 1, "what it has is told all the same");
    site.backup("web", &path);
    assert_eq!(vm(&status(&site, &[]).ok().json(), "web")["last"]["number"], 2);
    // A name that was typed wrong is no VM.
    site.reseal(["backup", "wbe", site.disk("no-such.raw").to_str().unwrap()]).expect(&[1]);
    assert!(!status(&site, &[]).ok().stdout.contains("wbe"));
    // What another machine did not see, it does not tell.
    let other = site.elsewhere();
    fs::create_dir_all(other.keyring.parent().unwrap()).unwrap();
    fs::copy(&site.keyring, &other.keyring).unwrap();
    let seen = status(&other, &[]).ok().json();
    assert_eq!((&vm(&seen, "web")["newest"]["number"], &vm(&seen, "web")["last"]), (&json!(2), &Value::Null));
    // And what failed there is over when a point was made here.
    other.reseal(["backup", "web", other.disk("no-such.raw").to_str().unwrap()]).expect(&[1]);
    status(&other, &[]).fails(1, &["the last backup of web made nothing"]);
    site.backup("web", &path);
    let over = status(&other, &[]).ok().json();
    assert_eq!((&vm(&over, "web")["newest"]["number"], &vm(&over, "web")["last"]["status"]), (&json!(3), &json!(1)));
}

#[test]
fn damage_that_was_found_stays_known_until_it_is_gone() {
    let site = Site::new();
    for (nth, vm) in ["web", "db"].into_iter().enumerate() {
        site.backup(vm, &disk(&site, vm, nth as u64));
    }
    site.verify();
    let whole = status(&site, &[]).ok().json();
    assert_eq!(
        (&vm(&whole, "web")["verified"]["damaged"], &whole["tenants"][0]["verified"]["damaged"]),
        (&json!(0), &json!(0))
    );
    site.backup("db", &disk(&site, "db", 3));
    // The largest pack is the data of one of them.
    let length = |key: &String| fs::metadata(site.vault.join(key)).unwrap().len();
    let pack = site.vault.join(site.packs(1).into_iter().max_by_key(length).unwrap());
    let good = fs::read(&pack).unwrap();
    let mut bad = good.clone();
    bad[1000] ^= 1;
    fs::write(&pack, &bad).unwrap();
    status(&site, &[]).ok();
    let found = site.reseal(["verify", "--json"]).expect(&[3]).json();
    let hurt: Vec<_> = found["damaged"][0]["hurts"].as_array().unwrap().clone();
    let (hurt_vm, number) = hurt[0].as_str().unwrap().split_once('@').unwrap();
    let number: u32 = number.parse().unwrap();
    let damaged = status(&site, &[]).expect(&[3]).json();
    let verdict = &vm(&damaged, hurt_vm)["verified"];
    assert_eq!((&verdict["damaged"], &verdict["hurts"][hurt_vm]), (&json!(1), &json!([number])), "{damaged:#}");
    let other = if hurt_vm == "web" { "db" } else { "web" };
    assert_eq!(vm(&damaged, other)["verified"]["damaged"], 0);
    let text = site.reseal(["status", "--metrics"]).expect(&[3]).stdout;
    assert!(text.contains(&format!("reseal_verify_damaged{{tenant=\"default\",vm=\"{hurt_vm}\"}} 1")), "{text}");
    fs::write(&pack, &good).unwrap();
    status(&site, &[]).expect(&[3]);
    site.reseal(["verify", hurt_vm]).ok();
    status(&site, &[]).fails(3, &["found 1 damaged object:"]);
    site.verify();
    status(&site, &[]).ok();
    // What shows by itself needs no verification.
    let manifest = site.tenant_folder().join("vms/web/00000001.manifest");
    let bytes = fs::read(&manifest).unwrap();
    fs::remove_file(&manifest).unwrap();
    status(&site, &[]).fails(3, &["newest restore point of web", "was rolled back"]);
    fs::write(&manifest, [&bytes[..200], &[bytes[200] ^ 1], &bytes[201..]].concat()).unwrap();
    let damaged = status(&site, &[]).fails(3, &["web/00000001.manifest", "failed authentication"]).json();
    assert_eq!(vm(&damaged, "db")["newest"]["number"], 2, "one that is damaged hides no other");
    fs::write(&manifest, bytes).unwrap();
    fs::remove_file(site.tenant_folder().join("vms/db/00000001.manifest")).unwrap();
    status(&site, &[]).fails(3, &["db@1 is missing"]);
}

#[test]
fn a_kms_that_is_down_is_said_and_hides_no_other_tenant() {
    let mut bao = Bao::start();
    let mut site = Site::new();
    Config::default().bao("bao", &bao).tenant("acme = \"bao\"").tenant("gone = \"bao\"").write(&mut site);
    for tenant in ["acme", "gone", "local"] {
        site.reseal(["tenant", "add", tenant, "--no-recovery"]).ok();
    }
    let path = disk(&site, "disk.raw", 1);
    site.reseal_of("acme", ["backup", "web", path.to_str().unwrap()]).ok();
    site.backup("web", &path);
    site.reseal(["tenant", "erase", "gone", "--yes", "gone"]).ok();
    let all = status(&site, &["--all-tenants"]).ok().json();
    let of = |report: &Value, name: &str| {
        report["tenants"].as_array().unwrap().iter().find(|tenant| tenant["tenant"] == name).unwrap().clone()
    };
    assert_eq!(all["tenants"].as_array().unwrap().len(), 4);
    assert!(of(&all, "gone")["erased"].is_string() && of(&all, "gone")["opened"] == false);
    assert_eq!((&of(&all, "acme")["kind"], &of(&all, "acme")["kms_answers"]), (&json!("vault"), &json!(true)));

    bao.kill();
    let address = format!("https://localhost:{}", bao.port());
    let down =
        site.reseal_of("acme", ["status", "--json"]).fails(4, &["tenant acme", &address, "can't be reached"]).json();
    let acme = of(&down, "acme");
    assert_eq!((&acme["kms_answers"], &acme["points"], &acme["opened"]), (&json!(false), &json!(1), &json!(false)));
    assert!(acme["why_not"].as_str().unwrap().contains(&address) && acme["used"].as_u64().unwrap() > 0);
    let all = status(&site, &["--all-tenants"]).expect(&[4]).json();
    assert_eq!(of(&all, "acme")["kms_answers"], false);
    assert_eq!(of(&all, "default")["vms"][0]["newest"]["number"], 1);
    let text = site.reseal(["status", "--all-tenants", "--metrics"]).expect(&[4]).stdout;
    assert!(
        text.contains("reseal_kms_up{tenant=\"acme\"} 0\n") && text.contains("reseal_kms_up{tenant=\"default\"} 1\n")
    );
    // A backup that could not begin for it is remembered as any other.
    site.reseal_of("acme", ["backup", "web", path.to_str().unwrap()]).expect(&[4]);
    // Something that has failed is worse than what can't be asked.
    site.reseal(["backup", "web", site.disk("no-such.raw").to_str().unwrap()]).expect(&[1]);
    status(&site, &["--all-tenants"]).expect(&[1]);
    bao.start_again();
    bao.unseal();
    let back = site.reseal_of("acme", ["status", "--json"]).fails(1, &["the last backup of web", &address]).json();
    assert_eq!(of(&back, "acme")["vms"][0]["last"]["status"], 4);
    let no_vault = Site::bare();
    for words in [&["status"][..], &["status", "--all-tenants"]] {
        no_vault.reseal(words).fails(1, &["is no vault"]);
    }
}

#[test]
fn a_change_of_the_data_keys_that_was_interrupted_is_said() {
    let site = Site::new();
    site.backup("web", &disk(&site, "disk.raw", 1));
    let keyring = Keyring::open(&site.keyring, |_| Err(std::io::ErrorKind::NotFound.into())).unwrap();
    let record = Record::read(site.store(), "vault", &TenantName::new("default").unwrap()).unwrap();
    record.next_epoch(&keyring, random_master().unwrap()).unwrap();
    let said = status(&site, &[]).fails(1, &["was interrupted", "reseal rekey --data"]).json();
    assert_eq!((&said["tenants"][0]["rekey"], &said["tenants"][0]["epoch"]), (&json!("interrupted"), &json!(2)));
    site.reseal(["rekey", "--data", "--no-recovery"]).ok();
    assert_eq!(status(&site, &[]).ok().json()["tenants"][0]["rekey"], Value::Null);
}

#[test]
fn who_is_at_work_is_named() {
    let site = Site::new();
    let path = site.disk("large.raw");
    fs::write(&path, Random::new(1).bytes(24 * MIB)).unwrap();
    let running = site.start(["backup", "--limit-rate", "2M", "web", path.to_str().unwrap()]);
    let began = std::time::Instant::now();
    while site.unfinished().is_empty() {
        assert!(began.elapsed() < Duration::from_secs(20) && !running.has_ended());
        sleep(Duration::from_millis(10));
    }
    let report = status(&site, &[]).ok().json();
    running.kill();
    assert!(report["tenants"][0]["at_work"][0].as_str().unwrap().contains("backup of web"), "{report:#}");
}

#[test]
fn it_costs_one_manifest_a_vm_however_many_points_there_are() {
    let site = Site::new();
    let tenant = site.tenant();
    let heads = site.heads(&tenant);
    let paths: Vec<_> = (0..2).map(|seed| disk(&site, &format!("{seed}.raw"), seed)).collect();
    let mut costs = Vec::new();
    for points in [2, 40] {
        for vm in ["web", "db"] {
            let there = tenant.chain(&reseal_tests::library::vm(vm)).unwrap().last();
            for nth in there..points {
                library_backup(&tenant, &heads, vm, &paths[nth as usize % 2]).unwrap();
            }
        }
        let watched = Arc::new(Watched::new(site.store()));
        let opened = site.tenant_in(watched.clone()).unwrap();
        watched.take_log();
        let report = TenantReport::of(&opened, &heads, &site.state, Timestamp(0)).unwrap();
        assert_eq!(report.points, 2 * points as usize);
        costs.push(watched.take_log());
    }
    let reads = |cost: &[(reseal_tests::faults::Operation, String)]| {
        cost.iter().filter(|(operation, _)| operation.reads()).map(|(_, key)| key.clone()).collect::<Vec<_>>()
    };
    assert_eq!(reads(&costs[0]).len(), 2, "{:?}", reads(&costs[0]));
    let newest = ["tenants/default/vms/db/00000040.manifest", "tenants/default/vms/web/00000040.manifest"];
    assert_eq!(reads(&costs[1]), newest);
    let others = |cost: &[(reseal_tests::faults::Operation, String)]| {
        cost.iter().filter(|(operation, key)| !operation.reads() && !key.contains("/packs/")).count()
    };
    assert_eq!(others(&costs[0]), others(&costs[1]), "no more listings for more points");
}

#[test]
fn metrics_are_a_text_that_is_replaced_whole() {
    let site = Site::new();
    site.backup("a\"b\\c", &disk(&site, "disk.raw", 1));
    set(&site, &["--objective", "24h"]);
    set(&site, &["--quota", "1G"]);
    let file = site.path("reseal.prom");
    let option = format!("--metrics={}", file.display());
    let ran = site.reseal(["status", &option]).ok();
    assert_eq!(ran.stdout, "");
    let text = fs::read_to_string(&file).unwrap();
    let labels = "tenant=\"default\",vm=\"a\\\"b\\\\c\"";
    for line in [
        "reseal_status 0".to_owned(),
        "reseal_kms_up{tenant=\"default\"} 1".to_owned(),
        "reseal_tenant_quota_bytes{tenant=\"default\"} 1073741824".to_owned(),
        format!("reseal_restore_point_objective_seconds{{{labels}}} 86400"),
        format!("reseal_restore_point_late{{{labels}}} 0"),
        format!("reseal_last_result{{{labels}}} 0"),
        format!("reseal_restore_point_number{{{labels}}} 1"),
    ] {
        assert!(text.lines().any(|known| known == line), "{line} is missing:\n{text}");
    }
    // Every metric is described once, before its values.
    let mut described = Vec::new();
    for line in text.lines() {
        match line.strip_prefix("# TYPE ") {
            Some(described_now) => described.push(described_now.strip_suffix(" gauge").unwrap().to_owned()),
            None if line.starts_with('#') => {}
            None => assert_eq!(line.split(['{', ' ']).next().unwrap(), described.last().unwrap()),
        }
    }
    let mut once = described.clone();
    once.sort();
    once.dedup();
    assert_eq!(once.len(), described.len());
    assert!(!site.path("reseal.prom.new").exists());
    site.reseal(["status", "--metrics=/no/such/folder/x"]).fails(1, &["can't write /no/such/folder/x"]);
    // The same from the library, as a server has it.
    let tenant = site.tenant();
    let mut report = Report::of_vault();
    report.tenants.push(TenantReport::of(&tenant, &site.heads(&tenant), &site.state, report.time).unwrap());
    assert!(metrics::text(&report).contains(&format!("reseal_restore_point_age_seconds{{{labels}}} ")));
}

fn site_status(sites: &Sites, enrolment: &Path, more: &[&str]) -> Run {
    sites.source.reseal([&["--repo", enrolment.to_str().unwrap(), "status", "--json"], more].concat())
}

#[test]
fn a_source_knows_its_certificate_its_server_and_its_jobs() {
    let mut sites = Sites::new();
    let path = disk(&sites.source, "disk.raw", 1);
    let enrolment = sites.enrolled(sites.port);
    let fresh = site_status(&sites, &enrolment, &[]).ok().json();
    assert_eq!((&fresh["site"]["server_answers"], &fresh["site"]["vms"]), (&json!(true), &json!([])));
    let jobs = sites.source.path("jobs.toml");
    let text = |objective: &str| {
        format!(
            "repo = {enrolment:?}\n[[job]]\nvm = 'web'\ndisks = [{path:?}]\nobjective = '{objective}'\nretries = 0\n"
        )
    };
    fs::write(&jobs, text("1s")).unwrap();
    sites.source.reseal(["run", jobs.to_str().unwrap()]).ok();
    let web = |report: &Value| report["site"]["vms"][0].clone();
    sleep(Duration::from_millis(2100));
    let late = site_status(&sites, &enrolment, &[]).fails(1, &["web is late", "its objective is 1s"]).json();
    assert_eq!((&web(&late)["done"]["number"], &web(&late)["late"]), (&json!(1), &json!(true)));
    assert!(web(&late)["done"]["sent"].as_u64().unwrap() >= MIB as u64);
    site_status(&sites, &enrolment, &["nobody"]).fails(1, &["nothing is known here of nobody"]);

    fs::write(&jobs, text("1h")).unwrap();
    sites.source.reseal(["run", jobs.to_str().unwrap()]).ok();
    site_status(&sites, &enrolment, &["web"]).ok();
    // The target has its own memory of the same.
    let target = status(&sites.target, &[]).ok().json();
    assert_eq!((&vm(&target, "web")["last"]["number"], &vm(&target, "web")["last"]["status"]), (&json!(2), &json!(0)));

    sites.stop();
    let gone = site_status(&sites, &enrolment, &[]).fails(4, &["127.0.0.1", "was lost"]).json();
    assert_eq!(gone["site"]["server_answers"], false);
    sites.source.reseal(["run", jobs.to_str().unwrap()]).expect(&[4]);
    sites.start();
    let failed = site_status(&sites, &enrolment, &[]).fails(1, &["the last backup of web made nothing"]).json();
    assert_eq!((&web(&failed)["last"]["status"], &web(&failed)["done"]["number"]), (&json!(4), &json!(2)));
    // A file of jobs that is gone promises nothing.
    fs::write(&jobs, text("1s")).unwrap();
    sites.source.reseal(["run", jobs.to_str().unwrap()]).ok();
    sleep(Duration::from_millis(2100));
    site_status(&sites, &enrolment, &[]).expect(&[1]);
    fs::remove_file(&jobs).unwrap();
    site_status(&sites, &enrolment, &[]).ok();
}

#[test]
fn a_certificate_that_ends_soon_or_is_not_taken_is_said() {
    let authority = Authority::new();
    let in_days = |days: i64| {
        let then = Timestamp(Report::of_vault().time.0 + days * 86_400_000).to_rfc3339();
        let part = |range: std::ops::Range<usize>| then[range].parse::<u8>().unwrap();
        date_time_ymd(then[..4].parse().unwrap(), part(5..7), part(8..10))
    };
    let good = authority.issue(|params| params.not_after = in_days(90));
    let soon = authority.issue(|params| params.not_after = in_days(12));
    let expired = authority.issue(|params| params.not_after = in_days(-2));
    let unknown = authority.issue(|_| {});
    let clients = [
        (good.clone(), "append", "[\"*\"]"),
        (soon.clone(), "append", "[\"*\"]"),
        (expired.clone(), "append", "[\"*\"]"),
    ];
    let sites = Sites::with(authority, &clients);
    let of = |name: &str, identity| sites.enrolment(name, identity, &sites.authority, sites.port);
    site_status(&sites, &of("good", &good), &[]).ok();
    let warned =
        site_status(&sites, &of("soon", &soon), &[]).fails(1, &["this site's certificate expires at", "in 11 days"]);
    assert_eq!(warned.json()["site"]["server_answers"], true);
    let ended = site_status(&sites, &of("expired", &expired), &[]).expect(&[1]).json();
    assert_eq!(ended["site"]["server_answers"], false);
    assert!(ended["problems"][0]["what"].as_str().unwrap().contains("has expired at"), "{ended:#}");
    site_status(&sites, &of("unknown", &unknown), &[]).fails(1, &["does not know the certificate"]);
    let foreign = sites.enrolment("foreign", &good, &Authority::new(), sites.port);
    site_status(&sites, &foreign, &[]).fails(1, &["can't be trusted"]);
    let words = ["--repo", foreign.to_str().unwrap(), "status", "--all-tenants"];
    sites.source.reseal(words).fails(2, &["--all-tenants"]);
    let text =
        sites.source.reseal(["--repo", of("soon", &soon).to_str().unwrap(), "status", "--metrics"]).expect(&[1]).stdout;
    assert!(text.contains("reseal_certificate_expiry_timestamp_seconds{server=\"127.0.0.1:"), "{text}");
}
