//! Restore points that run: started, left, killed, taken up again and ended, by the real programs, on a real QEMU.
#![allow(clippy::unwrap_used)] // helpers of tests end where they meet what they did not expect

use std::fs;
use std::io::Write;
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;

use reseal_tests::booted::{Booted, NOTICED, record, run_folder, runs};
use reseal_tests::guest::{BOOT, STALL, check_point, last_count, script, wait_for_count};
use reseal_tests::libvirtd::Libvirtd;
use reseal_tests::marker::Marker;
use reseal_tests::process::{bound_to_us, run, signal, start, wait_until};
use reseal_tests::s3_proxy::S3Proxy;
use reseal_tests::seaweed;
use reseal_tests::site::{Site, files_below};
use serde_json::{Value, json};

/// A site with one point of a disk that no system is on.
fn empty_disk() -> (Site, PathBuf) {
    let site = Site::new();
    let disk = site.disk("disk-0");
    fs::write(&disk, vec![7; 1 << 20]).unwrap();
    site.backup("vm", &disk);
    let overlay = site.path("overlay");
    (site, overlay)
}

/// Arguments for a VM that needs nothing.
const SMALL: [&str; 4] = ["--memory", "64M", "--shutdown-timeout", "1"];

/// A site with the guest that counts, as a restore point with a definition.
fn guest() -> (Site, PathBuf, PathBuf) {
    guest_at(Site::new())
}

/// The same at a site where no point is yet.
fn guest_at(site: Site) -> (Site, PathBuf, PathBuf) {
    let workspace = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
    let cache = std::env::var_os("RESEAL_CACHE").map_or(workspace.join(".cache"), PathBuf::from);
    let disks = cache.join("disk-guest");
    assert!(Command::new(script("debian-disk.sh")).arg("--guest").arg(&disks).status().unwrap().success());
    let definition = site.path("guest.xml");
    let xml = "<domain type='kvm'><name>guest</name><memory unit='MiB'>1024</memory><vcpu>2</vcpu>\
               <os><type arch='x86_64' machine='pc-q35-7.2'>hvm</type></os><devices>\
               <disk type='file' device='disk'><target dev='system' bus='virtio'/></disk>\
               <disk type='file' device='disk'><target dev='data' bus='scsi'/></disk></devices></domain>";
    fs::write(&definition, xml).unwrap();
    let named = |name: &str, file: &str| format!("{name}={}", disks.join(file).display());
    let words = ["backup", "--definition", definition.to_str().unwrap(), "guest"].map(str::to_owned);
    site.reseal(words.into_iter().chain([named("system", "base.raw"), named("data", "data.raw")])).ok();
    let (overlay, console) = (site.path("overlay"), site.path("console"));
    (site, overlay, console)
}

#[test]
fn a_guest_goes_on_after_whatever_dies_and_nothing_that_it_flushed_is_lost() {
    let (site, overlay, console) = guest();
    let arguments = ["--console", console.to_str().unwrap()];
    let mut booted = Booted::start(&site, "guest@latest", &overlay, &arguments);
    wait_for_count(&console, Some(3), BOOT);
    assert_eq!(fs::metadata(&booted.run).unwrap().mode() & 0o777, 0o700);
    assert_eq!(fs::metadata(&console).unwrap().mode() & 0o777, 0o600);

    // What serves is killed: the guest is paused, and goes on where it was when its disks are served again.
    let (qemu, before) = (booted.qemu, last_count(&console).unwrap());
    booted.kill_server();
    wait_until("the pause", NOTICED, || booted.state() == "io-error");
    assert!(runs(qemu));
    let paused = last_count(&console).unwrap();
    let booted_again = Booted::start(&site, "guest@latest", &overlay, &arguments);
    assert_eq!(booted_again.qemu, qemu, "it is the same VM");
    wait_until("the guest's going on", NOTICED, || booted_again.state() == "running");
    let count = wait_for_count(&console, Some(paused), STALL * 2);
    assert!(count > before);
    let said = fs::read_to_string(&console).unwrap();
    for bad in ["I/O error", "EXT4-fs error", "Remounting filesystem read-only"] {
        assert!(!said.contains(bad), "{bad}: {said}");
    }

    // Both are killed: it boots again, with all that it had flushed.
    let mut booted = booted_again;
    booted.kill_server();
    booted.kill_qemu();
    let flushed = last_count(&console).unwrap();
    fs::write(&console, "").unwrap();
    let booted = Booted::start(&site, "guest@1", &overlay, &arguments);
    assert_ne!(booted.qemu, qemu);
    let count = wait_for_count(&console, None, BOOT);
    assert!(count >= flushed, "{count} after {flushed}");

    // It shuts down.
    let (run, qemu) = (booted.run.clone(), booted.qemu);
    let _agent = power_off(&booted);
    let ended = booted.wait().ok();
    assert!(ended.stdout.contains("the VM is off"), "{ended:#?}");
    assert!(!runs(qemu) && !run.exists());
    let said = fs::read_to_string(&console).unwrap();
    assert!(said.contains("Power down") || said.contains("Powering off"), "{said}");
    let disks = ["system", "data"].map(|name| copied(&site, &overlay, name));
    let counts = check_point(&disks[0], &disks[1]);
    assert!(counts.system >= count, "{counts:?}");
    site.verify();
}

#[test]
fn a_guest_boots_from_an_object_store() {
    let proxy = S3Proxy::before(seaweed::shared().port());
    let mut site = seaweed::shared().site_at("boots", proxy.port());
    let cache = site.path("cache");
    site.variables.insert("RESEAL_STORE_CACHE".into(), cache.to_str().unwrap().into());
    site.variables.insert("RESEAL_LEASE_SECONDS".into(), "600".into());
    site.reseal(["init", "--no-recovery"]).ok();
    let (site, overlay, console) = guest_at(site);
    let before = proxy.count().0;
    let booted = Booted::start(&site, "guest@latest", &overlay, &["--console", console.to_str().unwrap()]);
    wait_for_count(&console, Some(3), BOOT);
    let first = proxy.count().0 - before;
    assert!(!files_below(&cache).is_empty(), "what it reads is kept");
    let _agent = power_off(&booted);
    let ended = booted.wait().ok();
    assert!(ended.stdout.contains("the VM is off"), "{ended:#?}");
    let counts = check_point(&copied(&site, &overlay, "system"), &copied(&site, &overlay, "data"));
    assert!(counts.system >= 3, "{counts:?}");
    // The next time what the first one read is at hand.
    fs::remove_dir_all(&overlay).unwrap();
    fs::write(&console, "").unwrap();
    let before = proxy.count().0;
    let booted = Booted::start(&site, "guest@latest", &overlay, &["--console", console.to_str().unwrap()]);
    wait_for_count(&console, Some(3), BOOT);
    let second = proxy.count().0 - before;
    assert!(second < first / 2, "{first} requests, then {second}");
    let _agent = power_off(&booted);
    booted.wait().ok();
}

/// Has the agent switch the guest off. It hears who stays.
fn power_off(booted: &Booted) -> UnixStream {
    let mut agent = UnixStream::connect(booted.run.join("agent.sock")).unwrap();
    // This small system has nobody who would heed its power button.
    let asked = json!({ "execute": "guest-exec", "arguments": { "path": "/bin/systemctl", "arg": ["poweroff"] } });
    agent.write_all(format!("{asked}\n").as_bytes()).unwrap();
    agent
}

/// A disk as the overlay has it, as a raw file.
fn copied(site: &Site, overlay: &Path, name: &str) -> PathBuf {
    let (socket, to) = (site.path("copy.sock"), site.path(format!("{name}.raw")));
    let words =
        ["nbd", "guest@1", "--writable", "--socket", socket.to_str().unwrap(), "--overlay", overlay.to_str().unwrap()];
    let server = start(bound_to_us(&mut site.command("reseal", words)));
    let uri = format!("nbd+unix:///guest@1/{name}?socket={}", socket.display());
    wait_until("the server", NOTICED, || run(Command::new("nbdinfo").args(["--size", &uri])).status == Some(0));
    run(Command::new("nbdcopy").args(["--destination-is-zero", &uri]).arg({
        fs::File::create(&to).unwrap().set_len(0).unwrap();
        &to
    }))
    .ok();
    signal(server.id(), libc::SIGTERM);
    server.wait().ok();
    to
}

#[test]
fn a_vm_is_announced_found_and_ended_and_leaves_nothing() {
    let (site, overlay) = empty_disk();
    let booted = Booted::start(&site, "vm@latest", &overlay, &[&SMALL[..], &["--json"]].concat());
    let (run, qemu) = (booted.run.clone(), booted.qemu);
    let recorded = record(&run).unwrap();
    assert_eq!((&recorded["version"], &recorded["vm"], &recorded["number"]), (&json!(1), &json!("vm"), &json!(1)));
    assert_eq!(recorded["overlay_folder"], json!(overlay));
    let disk = json!({ "name": "disk-0", "node": "disk-0", "device": "reseal-disk-0", "at": "overlay" });
    assert_eq!(recorded["disks"], json!([disk]));
    for name in ["nbd.sock", "qmp.sock", "qmp-promote.sock", "agent.sock", "console.sock", "qemu.pid", "qemu.log"] {
        assert_eq!(fs::metadata(run.join(name)).unwrap().mode() & 0o077, 0, "{name}");
    }
    // QEMU's disk is ours, and pauses the guest on errors.
    let mut monitor = booted.monitor();
    let block = monitor.run("query-block", json!({}));
    let block = &block.as_array().unwrap()[0];
    assert_eq!(block["inserted"]["node-name"], "disk-0");
    assert!(block["qdev"].as_str().unwrap().contains("reseal-disk-0"), "{block}");
    drop(monitor);
    // One overlay is one VM's.
    let words = ["boot", "vm@1", "--accel", "tcg", "--overlay", overlay.to_str().unwrap()];
    site.reseal(words).fails(1, &["in use"]);
    assert!(runs(qemu));
    let ended = booted.stop().ok();
    let lines: Vec<Value> = ended.json_lines();
    assert_eq!((&lines[0]["event"], &lines[0]["pid"]), (&json!("ready"), &json!(qemu)));
    assert_eq!(lines[0]["run_folder"], json!(run));
    assert_eq!((&lines[1]["event"], &lines[1]["how"]), (&json!("ended"), &json!("switched-off")));
    assert!(!runs(qemu) && !run.exists());
    // What nobody can go on with is told from what one can.
    let listed = site.reseal(["overlay", "list", "--json", overlay.to_str().unwrap()]).ok();
    assert!(listed.json_lines().iter().any(|found| found["folder"] == json!(overlay) && found["in_use"] == false));
}

#[test]
fn a_vm_whose_qemu_is_killed_ends_with_an_error_that_says_how_to_go_on() {
    let (site, overlay) = empty_disk();
    let booted = Booted::start(&site, "vm@latest", &overlay, &SMALL);
    booted.kill_qemu();
    let run = booted.run.clone();
    booted.wait().fails(1, &["killed", "reseal boot vm@1 --overlay"]);
    assert!(!run.exists());
    // And one that can't start says why.
    let failed = Booted::try_start(&site, "vm@1", &overlay, &[&SMALL[..], &["--", "-no-such-option"]].concat());
    failed.err().unwrap().fails(1, &["no-such-option"]);
    assert!(!run.exists());
    assert_eq!(Booted::start(&site, "vm@1", &overlay, &SMALL).stop().status, Some(0));
}

#[test]
fn a_vm_that_was_started_by_who_died_before_it_could_say_so_is_found() {
    let (site, overlay) = empty_disk();
    let mut booted = Booted::start(&site, "vm@1", &overlay, &SMALL);
    booted.kill_server();
    // Nobody else gets the overlay under a guest that lives.
    let (folder, socket) = (overlay.to_str().unwrap(), site.path("a.sock"));
    let words = ["nbd", "vm@1", "--writable", "--overlay", folder, "--socket", socket.to_str().unwrap()];
    site.reseal(words).fails(1, &["a VM that still runs"]);
    site.reseal(["overlay", "drop", folder]).fails(1, &["a VM that still runs"]);
    fs::remove_file(booted.run.join("boot.json")).unwrap();
    let again = Booted::start(&site, "vm@1", &overlay, &SMALL);
    assert_eq!(again.qemu, booted.qemu, "never two on one overlay");
    assert_eq!(record(&again.run).unwrap()["qemu"]["pid"], again.qemu);
    again.stop().ok();
    site.reseal(["overlay", "drop", folder]).ok();
}

#[test]
fn a_vm_for_one_time_dies_with_its_server_and_one_of_an_erased_tenant_ends() {
    let (site, overlay) = empty_disk();
    let words = ["boot", "vm@1", "--accel", "tcg", "--one-time", "--background", "--json", "--memory", "64M"];
    let ready = site.reseal(words).ok().json();
    assert_eq!(ready["overlay"], Value::Null);
    let pid = |name: &str| u32::try_from(ready[name].as_u64().unwrap()).unwrap();
    let run = PathBuf::from(ready["run_folder"].as_str().unwrap());
    let qemu = pid("pid");
    assert!(runs(qemu) && run.join("qmp.sock").exists());
    let status = fs::read_to_string(format!("/proc/{qemu}/status")).unwrap();
    let server = status.lines().find_map(|line| line.strip_prefix("PPid:")).unwrap().trim().parse().unwrap();
    signal(server, libc::SIGKILL);
    wait_until("QEMU's end", NOTICED, || !runs(qemu));
    assert_eq!(files_below(&site.path("tmp")), Vec::<PathBuf>::new());
    fs::remove_dir_all(run).unwrap();

    let booted = Booted::start(&site, "vm@1", &overlay, &SMALL);
    let qemu = booted.qemu;
    let erasing = site.start(["tenant", "erase", "default", "--yes", "default"]);
    booted.wait().fails(3, &["erased"]);
    assert!(!runs(qemu));
    erasing.wait().ok();
}

#[test]
fn what_would_be_started_is_printed_and_nothing_is() {
    let (site, overlay) = empty_disk();
    let marker = Marker::new(3);
    let words = ["boot", "vm@1", "--accel", "tcg", "--print", "--overlay", overlay.to_str().unwrap()];
    let printed = site.reseal([&words[..], &["--", "-name", marker.text()]].concat()).ok();
    assert!(printed.stdout.contains("qemu-system-") && printed.stdout.contains(marker.text()), "{printed:#?}");
    assert!(printed.stdout.contains("# vm@1/disk-0 is served at /"), "{printed:#?}");
    assert!(printed.stderr.contains("no definition"), "{printed:#?}");
    assert!(!overlay.exists());
    let json = site.reseal([&words[..], &["--json"]].concat()).ok().json();
    assert_eq!((&json["point"], &json["overlay"]), (&json!("vm@1"), &Value::Null));
    assert_eq!(json["exports"], json!(["vm@1/disk-0"]));
    assert!(!Path::new(json["run_folder"].as_str().unwrap()).exists());
    // As a domain.
    let xml = site.reseal([&words[..], &["--define"]].concat()).ok().stdout;
    assert!(xml.starts_with("<domain type='qemu'>") && xml.contains("<name>vm-recovered</name>"), "{xml}");
    // A libvirt that is too old for it leaves it out.
    assert!(xml.contains("<reconnect delay='10'/>"), "{xml}");

    let usage: [(&[&str], &str); 8] = [
        (&["--console", "stdio", "--json"], "standard output"),
        (&["--console", "vnc=0.0.0.0:0"], "SSH"),
        (&["--forward", "2222:22"], "--network"),
        (&["--network", "bridge=a,b"], "network interface"),
        (&["--memory", "1M"], "at least"),
        (&["--one-time", "--define"], "kept"),
        (&["--define", "--network", "restricted"], "libvirt"),
        (&["--define=a/b"], "domain"),
    ];
    for (arguments, said) in usage {
        let refused = site.reseal([&["boot", "vm@1", "--print", "--accel", "tcg"], arguments].concat());
        refused.fails(2, &[said]);
    }
}

#[test]
fn a_machine_with_uefi_has_variables_of_its_own() {
    let (site, overlay) = empty_disk();
    let console = site.path("console");
    let arguments = ["--firmware", "uefi", "--memory", "256M", "--shutdown-timeout", "0"];
    let console_too = ["--console", console.to_str().unwrap()];
    let booted = Booted::start(&site, "vm@1", &overlay, &[&arguments[..], &console_too].concat());
    assert_eq!(fs::metadata(booted.run.join("variables.fd")).unwrap().mode() & 0o777, 0o600);
    // There is no system that it could load, and it says so.
    wait_until("the firmware", BOOT, || fs::read_to_string(&console).is_ok_and(|said| said.contains("BdsDxe")));
    let run = booted.run.clone();
    booted.stop().ok();
    assert!(!run.exists());
}

#[test]
fn a_libvirt_domain_is_defined_on_disks_that_are_served_and_goes_on_after_its_server_was_killed() {
    let libvirtd = Libvirtd::start();
    let (site, overlay) = empty_disk();
    let define = || {
        let words = ["boot", "vm@1", "--accel", "tcg", "--memory", "64M", "--define=lab", "--shutdown-timeout", "1"];
        let words = [&words[..], &["--overlay", overlay.to_str().unwrap()]].concat();
        let server = start(bound_to_us(&mut site.command("reseal", words)));
        wait_until("the domain's socket", NOTICED, || {
            assert!(!server.has_ended(), "{:#?}", site.reseal(["overlay", "list"]));
            let defined = libvirtd.virsh(&["list", "--all", "--name"]).stdout.contains("lab");
            defined && run_folder(&overlay).is_some_and(|run| UnixStream::connect(run.join("nbd.sock")).is_ok())
        });
        server
    };
    let server = define();
    let xml = libvirtd.virsh(&["dumpxml", "lab"]).ok().stdout;
    for part in ["error_policy='stop'", "rerror_policy='stop'", "transport='unix'", "name='vm@1/disk-0'"] {
        assert!(xml.contains(part), "{part}: {xml}");
    }
    assert!(!xml.contains("<interface"), "{xml}");
    libvirtd.virsh(&["start", "lab"]).ok();
    let state = || libvirtd.virsh(&["domstate", "lab"]).stdout.trim().to_owned();
    assert_eq!(state(), "running");
    libvirtd.guest_writes("lab", 0, 9, 0, 4096);
    // The server is killed, and comes back to the same domain.
    server.kill();
    let server = define();
    wait_until("a domain that writes again", NOTICED, || {
        let device = "/machine/peripheral/virtio-disk0/virtio-backend";
        let command = format!("qemu-io -d {device} \"write -P 8 4096 4096\"");
        let said = libvirtd.virsh(&["qemu-monitor-command", "lab", "--hmp", &command]).stdout;
        !said.contains("rror") && !said.contains("failed")
    });
    signal(server.id(), libc::SIGTERM);
    let ended = server.wait().ok();
    assert!(ended.stdout.contains("virsh undefine --nvram lab"), "{ended:#?}");
    assert_eq!(state(), "shut off");
    // A domain of that name with other disks is left alone.
    libvirtd.virsh(&["undefine", "lab"]).ok();
    libvirtd.domain("lab", "");
    let words = ["boot", "vm@1", "--accel", "tcg", "--define=lab", "--overlay", overlay.to_str().unwrap()];
    site.reseal(words).fails(2, &["other disks"]);
    site.verify();
}
