//! VMs that run and keep writing, backed up meanwhile: every restore point is of one moment, whatever dies.
//!
//! The guest counts in order across its two disks, see `guest`. Emulation alone, so that it works wherever the tests
//! do.
#![allow(clippy::unwrap_used)] // helpers of tests end where they meet what they did not expect

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread::sleep;
use std::time::{Duration, Instant};

use reseal_tests::domain::Domain;
use reseal_tests::guest::{Counts, Guest, Images, boot, check_point};
use reseal_tests::libvirtd::Libvirtd;
use reseal_tests::mounting::Mounted;
use reseal_tests::process::{Running, system};
use reseal_tests::qmp::LeftBehind;
use reseal_tests::site::{Site, files_below};
use serde_json::Value;

const LIBVIRT: &str = "qemu:///system";
/// How long after the death of a writer its traces may last.
const CLEAN: Duration = Duration::from_secs(20);
/// How long after the death of a VM its backup may go on.
const NOTICED: Duration = Duration::from_secs(40);

/// A guest that runs, by one of the two ways to back it up.
enum Vm {
    Bare(Guest),
    Libvirt(Domain),
}

impl Vm {
    fn bare(images: &Images) -> Vm {
        Vm::Bare(Guest::counting(images))
    }

    fn libvirt(images: &Images, libvirtd: Libvirtd) -> Vm {
        let domain = Domain::define(images, libvirtd);
        domain.counting();
        Vm::Libvirt(domain)
    }

    /// `reseal backup` of it, as the VM `vm`.
    fn arguments(&self) -> Vec<String> {
        let of_vm = match self {
            Vm::Bare(guest) => {
                let [qmp, qga] = [&guest.qmp, &guest.qga].map(|path| path.display().to_string());
                ["--qmp".into(), qmp, "--qga".into(), qga].to_vec()
            }
            Vm::Libvirt(domain) => ["--libvirt", &domain.name].map(String::from).to_vec(),
        };
        ["backup", "--json", "vm"].map(String::from).into_iter().chain(of_vm).collect()
    }

    fn start_backup(&self, site: &Site) -> Running {
        let mut command = site.command("reseal", self.arguments());
        reseal_tests::process::start(command.env("LIBVIRT_DEFAULT_URI", LIBVIRT))
    }

    /// A backup that takes its time, to be killed: some seconds if it reads everything.
    fn start_slow_backup(&self, site: &Site) -> Running {
        let mut command = site.command("reseal", self.arguments());
        command.args(["--limit-rate", "60M"]);
        reseal_tests::process::start(command.env("LIBVIRT_DEFAULT_URI", LIBVIRT))
    }

    #[track_caller]
    fn backup(&self, site: &Site) -> Value {
        self.start_backup(site).wait().ok().json()
    }

    fn count(&self) -> u64 {
        match self {
            Vm::Bare(guest) => guest.count(),
            Vm::Libvirt(domain) => domain.count(),
        }
    }

    #[track_caller]
    fn counts_on(&self) -> u64 {
        match self {
            Vm::Bare(guest) => guest.counts_on(),
            Vm::Libvirt(domain) => domain.counts_on(),
        }
    }

    fn left_behind(&self) -> LeftBehind {
        match self {
            Vm::Bare(guest) => guest.monitor().left_behind(),
            Vm::Libvirt(domain) => domain.left_behind(),
        }
    }

    fn is_running(&self) -> bool {
        match self {
            Vm::Bare(guest) => guest.monitor().is_running(),
            Vm::Libvirt(domain) => domain.is_running(),
        }
    }

    /// What libvirt itself knows of backups.
    fn in_libvirt(&self) -> (Vec<String>, String) {
        match self {
            Vm::Bare(_) => (Vec::new(), String::new()),
            Vm::Libvirt(domain) => (domain.checkpoints(), domain.secrets()),
        }
    }

    /// Takes its power away while a backup runs, and switches it on again when that has ended.
    fn killed_during(self, images: &Images, backup: Running) -> Vm {
        let began = Instant::now();
        match self {
            Vm::Bare(guest) => {
                guest.kill();
                expect_failure(backup, began);
                Vm::bare(images)
            }
            Vm::Libvirt(domain) => {
                domain.kill();
                expect_failure(backup, began);
                domain.counting();
                Vm::Libvirt(domain)
            }
        }
    }
}

/// A backup whose VM was killed fails in time, and says what happened.
#[track_caller]
fn expect_failure(backup: Running, began: Instant) {
    // 2: it had not begun, and was told that the domain does not run.
    let run = backup.wait().expect(&[1, 2, 4]);
    assert!(began.elapsed() < NOTICED, "it took {:?}: {run:#?}", began.elapsed());
    assert!(run.stderr.lines().any(|line| line.starts_with("reseal: ")), "{run:#?}");
}

/// One guest at a time: on two cores several would only wait for each other. A test that failed does not stop the
/// others.
fn alone() -> MutexGuard<'static, ()> {
    static ALONE: Mutex<()> = Mutex::new(());
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The disks of a guest that is switched off, as raw files.
fn as_raw(images: &Images) -> (PathBuf, PathBuf) {
    let [to_system, to_data] = ["system", "data"].map(|disk| images.path(&format!("{disk}.raw")));
    let object = format!("secret,id=key,file={}", images.secret.display());
    let encrypted = format!("driver=qcow2,encrypt.key-secret=key,file.filename={}", images.system.display());
    let plain = format!("driver=qcow2,file.filename={}", images.data.display());
    for (image, to) in [(&encrypted, &to_system), (&plain, &to_data)] {
        let words = ["convert", "--object", &object, "--image-opts", image, "-O", "raw", to.to_str().unwrap()];
        system("qemu-img", &words);
    }
    (to_system, to_data)
}

/// Names of a point's disks, the system's first: it is the larger.
fn disk_names(site: &Site, number: u64) -> [String; 2] {
    let point = site.reseal(["show", "--json", &format!("vm@{number}")]).ok().json();
    let mut disks: Vec<_> = point["disks"].as_array().unwrap().clone();
    assert_eq!(disks.len(), 2, "{point}");
    disks.sort_by_key(|disk| std::cmp::Reverse(disk["length"].as_u64().unwrap()));
    [0, 1].map(|nth: usize| disks[nth]["name"].as_str().unwrap().to_owned())
}

/// Restores a point and checks that it is whole and of one moment.
#[track_caller]
fn check(site: &Site, number: u64) -> Counts {
    let [system_disk, data_disk] = disk_names(site, number).map(|name| {
        let to = site.disk(&format!("{number}-{name}.raw"));
        site.restore(&format!("vm@{number}"), &name, &to).ok();
        to
    });
    let counts = check_point(&system_disk, &data_disk);
    for disk in [system_disk, data_disk] {
        std::fs::remove_file(disk).unwrap();
    }
    counts
}

fn number_of(point: &Value, field: &str) -> u64 {
    point["stats"][field].as_u64().unwrap()
}

/// Checks that all is as before the first backup, but for what records changes since the newest point, if there is one.
/// A writer that was killed between its commit and its end leaves what recorded them since the point before, too, which the next
/// backup takes away. Returns what is wrong.
fn traces(site: &Site, vm: &Vm, before: &LeftBehind, secrets: &str, was_killed: bool) -> Result<(), String> {
    let mut left = vm.left_behind();
    let listed = site.reseal(["list", "--json"]).ok().json_lines();
    let mut ids = listed.iter().rev().map(|point| point["point_id"].as_str().unwrap().to_owned());
    let (newest, parent) = (ids.next(), ids.next().filter(|_| was_killed));
    let named_after_newest = |name: &String| newest.as_ref().is_some_and(|id| name.contains(id));
    let named_after_parent = |name: &String| parent.as_ref().is_some_and(|id| name.contains(id));
    let (mut checkpoints, secrets_now) = vm.in_libvirt();
    if left.bitmaps.iter().any(|(_, name)| named_after_newest(name)) {
        left.bitmaps.retain(|(_, name)| !named_after_parent(name));
        checkpoints.retain(|name| !named_after_parent(name));
    }
    let bitmaps = if newest.is_some() { 2 } else { 0 };
    if left.bitmaps.len() != bitmaps || !left.bitmaps.iter().all(|(_, name)| named_after_newest(name)) {
        return Err(format!("bitmaps beside those of {newest:?}: {:?}", left.bitmaps));
    }
    if checkpoints.len() > 1 || !checkpoints.iter().all(named_after_newest) {
        return Err(format!("checkpoints beside that of {newest:?}: {checkpoints:?}"));
    }
    if secrets_now != secrets {
        return Err(format!("secrets: {secrets_now}, before: {secrets}"));
    }
    let (left, before) = (left.but_bitmaps(), before.clone().but_bitmaps());
    if left != before {
        return Err(format!("{left:?}, before: {before:?}"));
    }
    let is_image = |path: &PathBuf| {
        let mut magic = [0; 4];
        File::open(path).and_then(|mut file| file.read_exact(&mut magic)).is_ok() && &magic == b"QFI\xfb"
    };
    let kept = [site.state.clone(), site.path("tmp"), site.path("home")];
    match kept.iter().flat_map(|folder| files_below(folder)).find(is_image) {
        Some(scratch) => Err(format!("scratch is left in {}", scratch.display())),
        None => Ok(()),
    }
}

#[track_caller]
fn wait_for_no_traces(site: &Site, vm: &Vm, before: &LeftBehind, secrets: &str, was_killed: bool) {
    let began = Instant::now();
    while let Err(left) = traces(site, vm, before, secrets, was_killed) {
        assert!(began.elapsed() < CLEAN, "{left}");
        sleep(Duration::from_millis(100));
    }
}

/// A count as the guest writes it, put into the file system on a raw disk.
fn put_count(disk: &Path, count: u64) {
    let file = disk.with_extension("count");
    std::fs::write(&file, format!("{count:020}\n")).unwrap();
    let [write, disk] = [format!("write {} counter", file.display()), disk.display().to_string()];
    for command in ["rm counter", &write] {
        system("debugfs", &["-w", "-R", command, &disk]);
    }
}

/// Of the tests themselves: the guest counts, its agent answers, and what is checked of disks does see different
/// moments.
#[test]
fn disks_of_different_moments_are_told_from_those_of_one() {
    let _alone = alone();
    let site = Site::new();
    let images = Images::new(&site.path("disks"));
    let guest = Guest::counting(&images);
    let (first, began) = (guest.count(), Instant::now());
    sleep(Duration::from_secs(2));
    let second = guest.counts_on();
    let rate = (second - first) as f64 / began.elapsed().as_secs_f64();
    assert!(rate > 1.0, "it counts {rate} a second");
    let began = Instant::now();
    while !guest.agent_answers() {
        assert!(began.elapsed() < Duration::from_secs(60), "the agent in the guest does not answer");
        sleep(Duration::from_millis(200));
    }
    guest.kill();
    let (system_disk, data_disk) = as_raw(&images);
    let Counts { system, data } = check_point(&system_disk, &data_disk);
    assert!(system >= second && data + 1 >= second, "{system} and {data} after {second}");
    for wrong in [system + 1, system - 2] {
        put_count(&data_disk, wrong);
        let torn = std::panic::catch_unwind(|| check_point(&system_disk, &data_disk));
        let said = *torn.unwrap_err().downcast::<String>().unwrap();
        assert!(said.contains("different moments"), "{said}");
    }
}

/// A vault, and what the VM was like before the first backup into it.
struct Watched {
    site: Site,
    before: LeftBehind,
    secrets: String,
}

impl Watched {
    #[track_caller]
    fn wait_for_no_traces(&self, vm: &Vm, was_killed: bool) {
        wait_for_no_traces(&self.site, vm, &self.before, &self.secrets, was_killed);
    }

    /// Kills a writer after each of these times. Nothing of it stays, and the guest goes on. How many were still
    /// running.
    fn kill_writers(&self, vm: &Vm, millis: &[u64]) -> usize {
        let mut killed = 0;
        for &millis in millis {
            let backup = vm.start_slow_backup(&self.site);
            sleep(Duration::from_millis(millis));
            let backup = backup.kill();
            // One that had ended had done so well.
            assert!(backup.status.is_none_or(|status| status == 0), "{backup:#?}");
            killed += usize::from(backup.status.is_none());
            self.wait_for_no_traces(vm, backup.status.is_none());
            assert!(vm.is_running());
            vm.counts_on();
        }
        killed
    }

    /// Makes a point and checks it; what is said of it, and what it holds.
    #[track_caller]
    fn point(&self, vm: &Vm) -> (Value, Counts) {
        let shown = vm.count();
        let point = vm.backup(&self.site);
        let later = vm.counts_on();
        let counts = check(&self.site, point["number"].as_u64().unwrap());
        let Counts { system, data } = counts;
        assert!(data + 1 >= shown && system <= later, "{shown} before, {counts:?}, {later} after");
        self.wait_for_no_traces(vm, false);
        assert!(point["definition"].is_string(), "what is needed to start it again: {point}");
        (point, counts)
    }
}

/// Writers killed at several moments, three points, a VM killed, a point again. One guest goes through all of it, for
/// to start it takes longest.
fn a_vm_is_backed_up_while_it_runs(site: Site, images: &Images, vm: Vm) {
    let watched = Watched { site, before: vm.left_behind(), secrets: vm.in_libvirt().1 };
    let site = &watched.site;
    let killed = watched.kill_writers(&vm, &[30, 100, 250, 600, 1200]);
    assert!(killed >= 3, "{killed} of five kills met a full backup");

    let (full, first) = watched.point(&vm);
    let all = number_of(&full, "read");
    assert!(all > 200 << 20, "{full}");
    let (next, second) = watched.point(&vm);
    let killed = watched.kill_writers(&vm, &[20, 80, 200, 350]);
    assert!(killed >= 1, "{killed} of four kills met an incremental backup");
    let (last, third) = watched.point(&vm);
    for point in [&next, &last] {
        // What changed in some seconds, in clusters of 64 KiB, against a whole system.
        assert!(number_of(point, "read") * 5 < all, "of {all} bytes: {point}");
    }
    assert!(first.data < second.data && second.data < third.data, "{first:?} {second:?} {third:?}");
    boot_newest(site, last["number"].as_u64().unwrap());

    // The VM dies; what it recorded may be lost or not, but the next point is right.
    let backup = vm.start_slow_backup(site);
    sleep(Duration::from_millis(150));
    let vm = vm.killed_during(images, backup);
    let after = vm.backup(site);
    let number = after["number"].as_u64().unwrap();
    let fourth = check(site, number);
    assert!(fourth.data >= third.data, "{fourth:?} after {third:?}");
    assert_eq!(check(site, number - 1), third, "the backup whose VM was killed made no point");
    site.verify();
}

/// The newest point boots from the mount.
fn boot_newest(site: &Site, number: u64) {
    let mounted = Mounted::new(site, "mnt", &[]);
    let names = disk_names(site, number);
    let [system_disk, data_disk] = names.map(|name| mounted.path.join(format!("vm/latest/{name}.raw")));
    let said = boot(&system_disk, &data_disk, &site.path("booted"));
    assert!(said.contains("login:"), "{said}");
    mounted.umount(site).ok();
}

#[test]
fn a_bare_vm_is_backed_up_while_it_runs_whatever_dies() {
    let _alone = alone();
    let site = Site::new();
    let images = Images::new(&site.path("disks"));
    let vm = Vm::bare(&images);
    a_vm_is_backed_up_while_it_runs(site, &images, vm);
}

#[test]
fn a_libvirt_domain_is_backed_up_while_it_runs_whatever_dies() {
    let _alone = alone();
    let site = Site::new();
    let libvirtd = Libvirtd::start();
    let images = Images::new(libvirtd.images());
    let vm = Vm::libvirt(&images, libvirtd);
    a_vm_is_backed_up_while_it_runs(site, &images, vm);
}
