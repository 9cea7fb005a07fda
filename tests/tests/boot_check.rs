//! Restore points whose boot is checked: by the real program and QEMU, without KVM; what is said, noted, and left behind.
#![allow(clippy::unwrap_used)] // helpers of tests end where they meet what they did not expect

use std::cell::RefCell;
use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread::sleep;
use std::time::{Duration, Instant};

use reseal_tests::guest::script;
use reseal_tests::library::vm;
use reseal_tests::process::{Run, Running, bound_to_us, signal, start};
use reseal_tests::site::{Site, files_below};
use serde_json::Value;

/// What a guest may take by emulation on a machine that does other things too.
const BOOT: &str = "600";

/// A site with a VM of a name that no other has.
struct Host {
    site: Site,
    vm: String,
    /// Folders of sockets that were seen.
    run_folders: RefCell<BTreeSet<PathBuf>>,
}

impl Host {
    fn new() -> Host {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let vm = format!("checked-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        Host { site: Site::new(), vm, run_folders: RefCell::default() }
    }

    /// With a disk that holds nothing.
    fn with_nothing() -> Host {
        let host = Host::new();
        let disk = host.site.disk("zeros.raw");
        fs::File::create(&disk).unwrap().set_len(8 << 20).unwrap();
        host.site.backup(&host.vm, &disk);
        host
    }

    /// With the disks of the Debian guest, which has an agent.
    fn with_guest() -> Host {
        let host = Host::new();
        let workspace = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
        let cache = std::env::var_os("RESEAL_CACHE").map_or(workspace.join(".cache"), PathBuf::from);
        let disks = cache.join("disk-guest");
        let made = Command::new(script("debian-disk.sh")).arg("--guest").arg(&disks).output().unwrap();
        assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
        let named = [("system", "base.raw"), ("data", "data.raw")];
        host.site.backup_disks(&host.vm, &named.map(|(name, file)| (name.to_owned(), disks.join(file))));
        host
    }

    fn point(&self) -> String {
        format!("{}@1", self.vm)
    }

    fn start(&self, arguments: &[&str]) -> Running {
        let point = self.point();
        let words = [&["boot", &point, "--check", "--accel", "tcg"], arguments].concat();
        start(bound_to_us(&mut self.site.command("reseal", words)))
    }

    fn check(&self, arguments: &[&str]) -> Run {
        let check = self.start(arguments);
        let began = Instant::now();
        while !check.has_ended() && began.elapsed() < Duration::from_secs(660) {
            self.look();
            sleep(Duration::from_millis(20));
        }
        check.wait()
    }

    /// The QEMUs of this VM. Where their sockets are is remembered.
    fn look(&self) -> Vec<u32> {
        let mut found = Vec::new();
        for entry in fs::read_dir("/proc").unwrap().flatten() {
            let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse().ok()) else { continue };
            let line = fs::read(entry.path().join("cmdline")).unwrap_or_default();
            let words: Vec<_> = line.split(|byte| *byte == 0).map(|word| String::from_utf8_lossy(word)).collect();
            let value = |option: &str| words.iter().skip_while(|word| *word != option).nth(1);
            if value("-name").is_some_and(|name| **name == *format!("guest={}", self.vm)) {
                found.push(pid);
                let folder = value("-pidfile").and_then(|path| Path::new(&**path).parent().map(Path::to_owned));
                self.run_folders.borrow_mut().extend(folder);
            }
        }
        found
    }

    fn boot(&self) -> Value {
        self.site.reseal(["show", &self.point(), "--json"]).ok().json()["boot"].clone()
    }

    /// That nothing of a check is anywhere but the note.
    #[track_caller]
    fn assert_nothing_left(&self) {
        assert_eq!(self.look(), Vec::<u32>::new());
        let folders = self.run_folders.borrow();
        assert!(!folders.is_empty() && folders.iter().all(|folder| !folder.exists()), "{folders:?}");
        let state = files_below(&self.site.state);
        assert!(!state.iter().any(|path| path.to_string_lossy().contains("overlay")), "{state:?}");
        assert_eq!(files_below(&self.site.path("tmp")), Vec::<PathBuf>::new());
        assert!(!self.site.objects().iter().any(|key| key.ends_with(".lease") || key.ends_with(".reader")));
    }
}

#[test]
fn a_guest_that_boots_passes_and_the_next_check_has_its_reads_at_hand() {
    let host = Host::with_guest();
    let before = host.site.contents();
    let run = host.check(&["--json", "--timeout", BOOT]).ok();
    let said = run.json();
    assert_eq!((&said["passed"], &said["expected"]), (&Value::from(true), &Value::from("console:login:")), "{run:#?}");
    host.assert_nothing_left();
    assert_eq!(host.boot()["passed"], true);
    assert!(host.site.reseal(["list"]).ok().stdout.contains("  passed 20"));
    let reads =
        host.site.tenant().boot_reads(&host.site.tenant().point(&vm(&host.vm), 1).unwrap().manifest).unwrap().unwrap();
    assert!(reads.count() > 300, "{} clusters", reads.count());

    let run = host.check(&["--expect", "agent", "--timeout", BOOT]).ok();
    assert!(run.stdout.contains(&format!("{} boots: agent after ", host.point())), "{run:#?}");
    host.assert_nothing_left();
    assert_eq!(host.boot()["expected"], "agent");
    host.site.reseal(["status"]).ok();

    // A service of the guest, in a network that leads nowhere.
    let run = host.check(&["--expect", "tcp:7", "--timeout", BOOT]).ok();
    assert!(run.stdout.contains(&format!("{} boots: tcp:7 after ", host.point())), "{run:#?}");
    host.assert_nothing_left();

    // Beside the notes, of which one of reads took another's place, nothing was added or changed.
    let after = host.site.contents();
    let added: Vec<_> = after.keys().filter(|key| !before.contains_key(*key)).collect();
    assert!(added.len() == 4 && added.iter().all(|key| key.contains("/notes/")), "{added:?}");
    assert!(before.iter().all(|(key, bytes)| after.get(key) == Some(bytes)));
    host.site.verify();
}

#[test]
fn a_disk_that_does_not_boot_fails_and_that_is_shown_until_one_passes() {
    let host = Host::with_nothing();
    let run =
        host.check(&["--timeout", "3"]).fails(1, &[" does not boot: its console did not show \"login:\" within 3.0 s"]);
    assert!(!run.stderr.chars().any(|c| c.is_control() && c != '\n'), "{run:#?}");
    host.assert_nothing_left();
    let boot = host.boot();
    assert_eq!(
        (&boot["passed"], &boot["reason"]),
        (&Value::from(false), &Value::from("its console did not show \"login:\" within 3.0 s"))
    );
    assert!(host.site.reseal(["list"]).ok().stdout.contains("  FAILED 20"));
    host.site.reseal(["status"]).fails(1, &["@1 did not boot when that was checked at 20"]);
    // What nobody answers, this machine does not take for the guest.
    for expected in ["agent", "tcp:22"] {
        let run = host.check(&["--expect", expected, "--timeout", "8", "--json"]).expect(&[1]);
        assert_eq!(run.json()["passed"], false, "{run:#?}");
        assert_eq!(host.boot()["expected"], expected);
        host.assert_nothing_left();
    }
    for wrong in [
        &["--expect", "login"][..],
        &["--timeout", "0"],
        &["--network", "user"],
        &["--overlay", "x"],
        &["--background"],
    ] {
        host.check(wrong).expect(&[2]);
    }
}

#[test]
fn a_check_that_is_stopped_or_killed_leaves_no_vm_and_no_verdict() {
    let host = Host::with_nothing();
    for how in [libc::SIGINT, libc::SIGTERM] {
        let check = host.start(&["--timeout", "600"]);
        wait(|| !host.look().is_empty());
        signal(check.id(), how);
        check.wait().fails(1, &["was stopped; nothing is noted"]);
        host.assert_nothing_left();
    }
    let check = host.start(&["--timeout", "600"]);
    wait(|| !host.look().is_empty());
    signal(check.id(), libc::SIGKILL);
    check.wait();
    wait(|| host.look().is_empty());
    // Nobody was left to take the sockets away.
    host.run_folders
        .borrow()
        .iter()
        .filter(|folder| folder.exists())
        .for_each(|folder| fs::remove_dir_all(folder).unwrap());
    assert_eq!(host.boot(), Value::Null);
}

fn wait(until: impl Fn() -> bool) {
    let began = Instant::now();
    while !until() {
        assert!(began.elapsed() < Duration::from_secs(60));
        sleep(Duration::from_millis(20));
    }
}
