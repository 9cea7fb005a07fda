//! Scheduled jobs: in parallel, again where something was unreachable, with commands around them, killed and ended in between.
#![allow(clippy::unwrap_used)] // helpers of tests end where they meet what they did not expect

use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::thread::sleep;
use std::time::{Duration, Instant};

use reseal_tests::process::{Run, Running, signal, system, wait_until};
use reseal_tests::random::Random;
use reseal_tests::remote::Sites;
use reseal_tests::site::Site;
use serde_json::{Value, json};

const MIB: usize = 1 << 20;
/// What is to happen happens within this, on a busy machine.
const SOON: Duration = Duration::from_secs(30);

fn disk(site: &Site, name: &str, seed: u64, length: usize) -> PathBuf {
    let path = site.disk(name);
    fs::write(&path, Random::new(seed).bytes(length)).unwrap();
    path
}

/// Writes a file of jobs.
fn jobs(site: &Site, text: &str) -> PathBuf {
    let path = site.path("jobs.toml");
    fs::write(&path, text).unwrap();
    fs::set_permissions(&path, Permissions::from_mode(0o644)).unwrap();
    path
}

/// A job of that VM and disk.
fn job(vm: &str, disk: &Path, more: &str) -> String {
    format!("[[job]]\nvm = {vm:?}\ndisks = [{disk:?}]\n{more}\n")
}

fn run(site: &Site, jobs: &Path, more: &[&str]) -> Run {
    site.reseal([&["run", "--json", jobs.to_str().unwrap()], more].concat())
}

fn start(site: &Site, jobs: &Path) -> Running {
    site.start(["run", "--json", jobs.to_str().unwrap()])
}

/// The event that tells how a job ended.
#[track_caller]
fn ended(run: &Run, job: &str) -> Value {
    let is_it = |event: &Value| event["event"] == "ended" && event["job"] == job;
    run.json_lines().into_iter().find(is_it).unwrap_or_else(|| panic!("{job} did not end: {run:#?}"))
}

/// Processes that were given a word with this site's folder, but for those that only begin to run.
fn processes(site: &Site) -> Vec<u32> {
    let folder = site.path("").display().to_string();
    let of = |entry: fs::DirEntry| {
        let pid: u32 = entry.file_name().to_str()?.parse().ok()?;
        let words = fs::read(entry.path().join("cmdline")).ok()?;
        String::from_utf8_lossy(&words).contains(&folder).then_some(pid)
    };
    fs::read_dir("/proc").unwrap().flatten().filter_map(of).collect()
}

/// Processes of backups.
fn backups(site: &Site) -> Vec<u32> {
    let is_backup = |pid: &u32| {
        fs::read(format!("/proc/{pid}/cmdline"))
            .is_ok_and(|words| String::from_utf8_lossy(&words).split('\0').any(|word| word == "backup"))
    };
    processes(site).into_iter().filter(is_backup).collect()
}

#[test]
fn jobs_do_what_a_backup_does_and_are_told_one_a_line() {
    let site = Site::new();
    let (a, b) = (disk(&site, "a.raw", 1, MIB), disk(&site, "b.raw", 2, 2 * MIB));
    let definition = site.path("web.xml");
    fs::write(&definition, "<domain/>").unwrap();
    let text = format!(
        "repo = {:?}\n[[job]]\nname = 'night'\nvm = 'web'\ndisks = ['root={}', 'data={}']\ndefinition = {definition:?}\n{}",
        site.vault,
        a.display(),
        b.display(),
        job("-dash", &a, ""),
    );
    let file = jobs(&site, &text);
    let check = site.reseal(["run", "--check", file.to_str().unwrap()]).ok();
    assert!(check.stdout.contains("all right: 2 jobs, 1 at once"), "{check:#?}");
    let foretold = site.reseal(["run", "--dry-run", file.to_str().unwrap()]).ok();
    assert!(foretold.stdout.contains(&format!("\"root={}\"", a.display())), "{foretold:#?}");
    assert!(!site.objects().iter().any(|key| key.contains(".manifest")), "neither makes anything");

    let done = run(&site, &file, &[]).ok();
    let web = ended(&done, "night");
    assert_eq!((&web["result"], &web["attempts"], &web["point"]["number"]), (&json!("done"), &json!(1), &json!(1)));
    assert_eq!(web["point"]["definition"], "web.xml");
    assert_eq!(done.json_lines().last().unwrap()["done"], 2);
    let out = site.path("restored");
    site.restore("web@1", "data", &out).ok();
    assert!(fs::read(&out).unwrap() == fs::read(&b).unwrap());
    site.verify();

    let one = site.reseal(["run", file.to_str().unwrap(), "night"]).ok();
    assert!(one.stdout.contains("night: web@2 ") && one.stdout.contains("all 1 jobs are done"), "{one:#?}");
    run(&site, &file, &["nobody"]).fails(2, &["there is no job \"nobody\"", "night"]);
}

#[test]
fn the_worst_that_happened_is_the_exit_status() {
    let site = Site::new();
    let good = disk(&site, "good.raw", 1, MIB);
    let missing = job("missing", &site.disk("no-such.raw"), "");
    let nobody = "[[job]]\nvm = 'nobody'\ndisks = ['nbd://127.0.0.1:1/x']\nsource_timeout = 1\nretries = 0\n";
    let both = format!("{}{nobody}", job("good", &good, ""));
    let unreachable = run(&site, &jobs(&site, &both), &[]).fails(4, &["1 jobs are done, 1 failed"]);
    assert_eq!(ended(&unreachable, "nobody")["status"], 4);
    assert_eq!(ended(&unreachable, "good")["point"]["number"], 1);
    let failed = run(&site, &jobs(&site, &format!("{both}{missing}")), &[]).expect(&[1]);
    let said = ended(&failed, "missing");
    assert!(said["message"].as_str().unwrap().contains("no-such.raw"), "{said}");
    assert_eq!(failed.json_lines().last().unwrap()["failed"], 2);
    // The newest manifest is damaged: worse than either.
    let newest = site.tenant_folder().join("vms/good/00000002.manifest");
    let mut bytes = fs::read(&newest).unwrap();
    bytes[200] ^= 1;
    fs::write(&newest, bytes).unwrap();
    run(&site, &jobs(&site, &format!("{both}{missing}")), &[]).expect(&[3]);
}

#[test]
fn as_many_vms_at_once_as_the_file_says_and_no_more() {
    let site = Site::new();
    let disk = disk(&site, "disk.raw", 1, MIB);
    let marks = site.path("marks");
    fs::create_dir(&marks).unwrap();
    let (begin, end) = (
        format!(
            "touch {0}/$RESEAL_JOB; ls {0} | wc -l >> {1}; sleep 0.5",
            marks.display(),
            site.path("counts").display()
        ),
        format!("rm {}/$RESEAL_JOB", marks.display()),
    );
    let mut text = format!(
        "parallel = 3\n[defaults]\nbefore = ['/bin/sh', '-c', '{begin}']\nafter = ['/bin/sh', '-c', '{end}']\n"
    );
    for nth in 0..7 {
        text += &job(&format!("vm{nth}"), &disk, "");
    }
    run(&site, &jobs(&site, &text), &[]).ok();
    let counts = fs::read_to_string(site.path("counts")).unwrap();
    let counts: Vec<u32> = counts.lines().map(|line| line.trim().parse().unwrap()).collect();
    assert_eq!((counts.len(), counts.iter().max()), (7, Some(&3)), "{counts:?}");
    assert_eq!(fs::read_dir(&marks).unwrap().count(), 0, "each had its end");
    assert_eq!(site.verify()["points"], 7);
}

#[test]
fn commands_know_what_happened_and_one_that_hangs_is_ended() {
    let site = Site::new();
    let good = disk(&site, "good.raw", 1, MIB);
    let log = site.path("log");
    let after = format!(
        "after = ['/bin/sh', '-c', 'echo $RESEAL_JOB,$RESEAL_VM,$RESEAL_RESULT,$RESEAL_STATUS,$RESEAL_POINT >> {}']",
        log.display()
    );
    let text = format!(
        "[defaults]\n{after}\ncommand_timeout = '1s'\n{}{}{}{}",
        job("good", &good, "before = ['/bin/true']"),
        job("missing", &site.disk("no-such.raw"), "name = 'broken'"),
        job("refused", &good, "before = ['/bin/sh', '-c', 'exit 9']"),
        job("hangs", &good, "before = ['/bin/sleep', '600']"),
    );
    let began = Instant::now();
    let ran = run(&site, &jobs(&site, &text), &[]).fails(1, &["1 jobs are done, 1 failed, 2 were skipped"]);
    assert!(began.elapsed() < SOON);
    let log = fs::read_to_string(log).unwrap();
    let lines: Vec<_> = log.lines().collect();
    assert_eq!(
        lines,
        ["good,good,done,0,good@1", "broken,missing,failed,1,", "refused,refused,skipped,1,", "hangs,hangs,skipped,1,"]
    );
    assert!(ended(&ran, "hangs")["message"].as_str().unwrap().contains("took longer than 1s"));
    assert!(ended(&ran, "refused")["message"].as_str().unwrap().contains("exit status: 9"));
    assert_eq!(site.verify()["points"], 1, "nothing was read where the command before had failed");
    // What was not tried shows, too.
    let status = site.reseal(["status", "--json"]).expect(&[1]).json();
    let last = |vm: &str| {
        let vms = status["tenants"][0]["vms"].as_array().unwrap();
        vms.iter().find(|known| known["vm"] == vm).unwrap()["last"]["status"].clone()
    };
    assert_eq!(["good", "missing", "refused", "hangs"].map(last), [json!(0), json!(1), json!(1), json!(1)]);
    // One that fails afterwards does not undo the point, and is not passed over.
    let text = job("good", &good, "after = ['/bin/false']");
    let ran = run(&site, &jobs(&site, &text), &[]).expect(&[1]);
    let good = ended(&ran, "good");
    assert_eq!((&good["result"], &good["status"], &good["point"]["number"]), (&json!("done"), &json!(1), &json!(2)));
}

#[test]
fn a_server_that_comes_up_later_gets_the_point() {
    let mut sites = Sites::new();
    let disk = disk(&sites.source, "disk.raw", 1, MIB);
    let enrolment = sites.enrolled(sites.port);
    let again = "retries = 50\nretry_pause = '1s'\nobjective = '1h'";
    let file = jobs(&sites.source, &format!("repo = {enrolment:?}\n{}", job("web", &disk, again)));
    sites.stop();
    let once = format!("repo = {enrolment:?}\n{}", job("web", &disk, "retries = 1\nretry_pause = '1s'"));
    let gone = run(&sites.source, &jobs(&sites.source, &once), &[]).expect(&[4]);
    assert_eq!(ended(&gone, "web")["attempts"], 2, "{gone:#?}");
    jobs(&sites.source, &format!("repo = {enrolment:?}\n{}", job("web", &disk, again)));
    let waiting = start(&sites.source, &file);
    sleep(Duration::from_millis(1500));
    assert!(!waiting.has_ended());
    sites.start();
    let done = waiting.wait().ok();
    let web = ended(&done, "web");
    assert!(web["attempts"].as_u64().unwrap() >= 2 && web["point"]["number"] == 1, "{web}");
    assert!(done.json_lines().iter().any(|event| event["event"] == "again" && event["pause"] == 1), "{done:#?}");
    sites.target.verify();
}

#[test]
fn one_run_of_a_file_at_a_time_and_whoever_is_killed_blocks_nobody() {
    let site = Site::new();
    let disk = disk(&site, "disk.raw", 1, 24 * MIB);
    let file = jobs(&site, &job("web", &disk, "limit_rate = '2M'"));
    let first = start(&site, &file);
    wait_until("the backup's beginning", SOON, || !site.unfinished().is_empty() && backups(&site).len() == 1);
    run(&site, &file, &[]).fails(1, &["are being run by another process"]);
    first.kill();
    wait_until("the end of what it had started", SOON, || processes(&site).is_empty());
    fs::write(&file, job("web", &disk, "")).unwrap();
    let done = run(&site, &file, &[]).ok();
    assert_eq!(ended(&done, "web")["point"]["number"], 1, "nothing of the first was committed");
    site.verify();
    site.reseal(["status"]).ok();
}

#[test]
fn a_backup_that_is_killed_ends_no_other_and_is_remembered() {
    let site = Site::new();
    let (large, small) = (disk(&site, "large.raw", 1, 24 * MIB), disk(&site, "small.raw", 2, MIB));
    let wait = "before = ['/bin/sleep', '2']";
    let text = format!("parallel = 2\n{}{}", job("large", &large, "limit_rate = '2M'"), job("small", &small, wait));
    let running = start(&site, &jobs(&site, &text));
    wait_until("the backup's beginning", SOON, || !site.unfinished().is_empty() && backups(&site).len() == 1);
    signal(backups(&site)[0], libc::SIGKILL);
    let ran = running.wait().expect(&[1]);
    assert!(ended(&ran, "large")["message"].as_str().unwrap().contains("was killed (signal 9)"));
    assert_eq!(ended(&ran, "small")["result"], "done");
    site.reseal(["status", "large"]).fails(1, &["the last backup of large made nothing", "was killed"]);
    site.reseal(["status", "small"]).ok();
}

#[test]
fn who_is_asked_to_end_ends_its_backups_and_begins_no_more() {
    let site = Site::new();
    let disk = disk(&site, "disk.raw", 1, 24 * MIB);
    let log = site.path("log");
    let after = format!("after = ['/bin/sh', '-c', 'echo $RESEAL_JOB $RESEAL_RESULT >> {}']", log.display());
    let text = format!("[defaults]\nlimit_rate = '2M'\n{after}\n{}{}", job("one", &disk, ""), job("two", &disk, ""));
    let running = start(&site, &jobs(&site, &text));
    wait_until("the backup's beginning", SOON, || !site.unfinished().is_empty());
    signal(running.id(), libc::SIGTERM);
    let began = Instant::now();
    let ran = running.wait().expect(&[1]);
    assert!(began.elapsed() < Duration::from_secs(10));
    assert_eq!((&ended(&ran, "one")["result"], &ended(&ran, "two")["result"]), (&json!("failed"), &json!("skipped")));
    assert_eq!(fs::read_to_string(log).unwrap(), "one failed\n");
    assert!(processes(&site).is_empty(), "all have ended");
    assert_eq!(site.verify()["points"], 0);
}

#[test]
fn a_backup_that_takes_too_long_is_ended() {
    let site = Site::new();
    let disk = disk(&site, "disk.raw", 1, 24 * MIB);
    let file = jobs(&site, &job("web", &disk, "limit_rate = '1M'\ntimeout = '1s'"));
    let ran = run(&site, &file, &[]).expect(&[1]);
    assert!(ended(&ran, "web")["message"].as_str().unwrap().contains("took longer than 1s and was ended"));
}

#[test]
fn a_file_that_makes_no_sense_or_is_not_trusted_does_nothing() {
    let site = Site::new();
    let disk = disk(&site, "disk.raw", 1, MIB);
    let refused = |text: &str, said: &[&str]| {
        let file = jobs(&site, text);
        for more in [&["--check"][..], &[]] {
            run(&site, &file, more).fails(2, said);
        }
    };
    refused("[[job]]\nvm = 'web'\n", &["job web", "required arguments were not provided"]);
    refused(&job("web", &disk, "limit_rate = '5X'"), &["job web", "--limit-rate", "is no unit"]);
    refused(&job("web", &disk, "tls_cert = '/c.pem'"), &["job web", "--tls-key"]);
    refused(&job("web", &disk, "libvirt = 'web'"), &["job web", "cannot be used with"]);
    refused(&job("web", &disk, "retention = 'keep-last=3'"), &["job web", "forget no restore points"]);
    refused(&job("web", &disk, "shell = 'rm'"), &["unknown field `shell`"]);
    let file = jobs(&site, &job("web", &disk, ""));
    fs::set_permissions(&file, Permissions::from_mode(0o664)).unwrap();
    run(&site, &file, &[]).fails(2, &["jobs.toml", "chmod go-w"]);
    run(&site, &site.path("no-such.toml"), &[]).fails(2, &["there is no such file"]);
    assert!(!site.objects().iter().any(|key| key.contains("/vms/")));
}

#[test]
fn the_units_are_what_systemd_takes() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().join("writer/systemd");
    let site = Site::bare();
    for unit in ["reseal@.service", "reseal@.timer"] {
        let text = fs::read_to_string(folder.join(unit)).unwrap();
        // The one thing that is not on a machine where reseal is not installed.
        let text = text.replace("/usr/bin/reseal ", "/bin/true ");
        assert!(unit.ends_with(".timer") || text.contains("ExecStart=/bin/true run /etc/reseal/%i.toml"), "{text}");
        fs::write(site.path(unit), text).unwrap();
    }
    let [service, timer] = ["reseal@night.service", "reseal@night.timer"].map(|unit| {
        let template = unit.replace("night", "");
        fs::copy(site.path(template), site.path(unit)).unwrap();
        site.path(unit).display().to_string()
    });
    let mut analyze = std::process::Command::new("systemd-analyze");
    let ran = reseal_tests::process::run(analyze.args(["verify", "--man=no", &service, &timer])).ok();
    assert_eq!(ran.stderr, "", "systemd warns of nothing");
    let said = system("systemd-analyze", &["security", "--offline=true", "--no-pager", &service]);
    let exposure = said.lines().rev().find(|line| line.contains("exposure level")).unwrap();
    let level: f64 = exposure.split_whitespace().find_map(|word| word.parse().ok()).unwrap();
    assert!(level < 7.0, "{exposure}");
}
