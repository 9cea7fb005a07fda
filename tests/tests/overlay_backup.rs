//! What a recovered VM wrote becomes a restore point: only that is read, whatever lies between, and what does not fit is not
//! believed.
#![allow(clippy::unwrap_used)] // helpers of tests end where they meet what they did not expect

use std::fs;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::Command;
use std::time::{Duration, Instant};

use reseal_tests::process::{Running, bound_to_us, run, signal, start};
use reseal_tests::random::Random;
use reseal_tests::site::Site;
use serde_json::{Value, json};

const CLUSTER: usize = 65_536;
const LENGTH: usize = 400 * CLUSTER + 4096 + 512;

/// The disks of a restore point, with an overlay, as a VM that was recovered sees them.
struct Recovered<'a> {
    site: &'a Site,
    process: Option<Running>,
    socket: PathBuf,
}

impl<'a> Recovered<'a> {
    fn start(site: &'a Site, point: &str) -> Recovered<'a> {
        let (socket, folder) = (site.path("vm.sock"), site.path("overlay"));
        let words =
            ["nbd", point, "--writable", "--overlay", folder.to_str().unwrap(), "--socket", socket.to_str().unwrap()];
        let process = start(bound_to_us(&mut site.command("reseal", words)));
        let began = Instant::now();
        while UnixStream::connect(&socket).is_err() {
            assert!(!process.has_ended() && began.elapsed() < Duration::from_secs(60), "nothing is served");
            std::thread::sleep(Duration::from_millis(5));
        }
        Recovered { site, process: Some(process), socket }
    }

    fn uri(&self, disk: &str) -> String {
        format!("nbd+unix:///vm@1/{disk}?socket={}", self.socket.display())
    }

    #[track_caller]
    fn writes(&self, disk: &str, commands: &[&str]) {
        let mut command = Command::new("qemu-io");
        command.args(["-f", "raw", "-t", "none"]).args(commands.iter().flat_map(|command| ["-c", command]));
        let said = run(command.arg(self.uri(disk))).said();
        assert!(!said.contains("failed") && !said.contains("rror"), "{said}");
    }

    /// Makes a restore point of what it is now; what `--json` says of it.
    #[track_caller]
    fn backup(&self, vm: &str, disks: &[&str]) -> Value {
        let words = ["backup", "--json", vm].into_iter().chain(disks.iter().copied());
        self.site.reseal(words).ok().json()
    }

    fn stop(mut self) {
        let process = self.process.take().unwrap();
        signal(process.id(), libc::SIGTERM);
        process.wait().ok();
    }
}

impl Drop for Recovered<'_> {
    fn drop(&mut self) {
        if let Some(process) = self.process.take() {
            drop(process.kill());
        }
    }
}

/// A site with a restore point of disks of random bytes around a hole, and what each disk holds.
fn site(disks: &[&str]) -> (Site, Vec<Vec<u8>>) {
    let site = Site::new();
    let (mut contents, mut named) = (Vec::new(), Vec::new());
    for (seed, name) in (0..).zip(disks) {
        let mut content = Random::new(seed).bytes(LENGTH);
        content[300 * CLUSTER..350 * CLUSTER].fill(0);
        fs::write(site.disk(name), &content).unwrap();
        named.push(((*name).to_owned(), site.disk(name)));
        contents.push(content);
    }
    site.backup_disks("vm", &named);
    (site, contents)
}

#[track_caller]
fn assert_holds(site: &Site, point: &str, disk: &str, content: &[u8]) {
    let to = site.path("restored.raw");
    let _ = fs::remove_file(&to);
    site.restore(point, disk, &to).ok();
    assert!(fs::read(&to).unwrap() == content, "{point} {disk}");
}

fn number(point: &Value, name: &str) -> usize {
    usize::try_from(point["stats"][name].as_u64().unwrap()).unwrap()
}

#[test]
fn only_what_was_written_is_read_and_stored() {
    let (site, mut contents) = site(&["disk-0"]);
    let content = &mut contents[0];
    let recovered = Recovered::start(&site, "vm@1");
    recovered.writes("disk-0", &["write -P 7 655460 4096", "write -P 8 1310720 262144", "write -P 9 20M 512", "flush"]);
    content[655_460..655_460 + 4096].fill(7);
    content[1_310_720..1_310_720 + 262_144].fill(8);
    content[20 << 20..(20 << 20) + 512].fill(9);
    // Zeros over data, data where there was a hole, and the last bytes.
    let tail = LENGTH - 512;
    recovered.writes("disk-0", &["write -z 6553600 1M", "discard 131072 65536", &format!("write -P 5 {tail} 512")]);
    content[6_553_600..6_553_600 + (1 << 20)].fill(0);
    content[131_072..131_072 + 65_536].fill(0);
    content[tail..].fill(5);
    let made = recovered.backup("vm", &[&recovered.uri("disk-0")]);
    assert_eq!((&made["number"], &made["warnings"]), (&json!(2), &json!([])), "{made:#}");
    let id =
        format!("{}/vm@1/disk-0", site.reseal(["show", "--json", "vm@1"]).ok().json()["point_id"].as_str().unwrap());
    let claim = &made["disks"][0]["claim"];
    assert_eq!(
        (&claim["method"], &claim["id"], &claim["since"]),
        (&json!("overlay"), &json!(id), &json!(1)),
        "{made:#}"
    );
    // Clusters 10, 20 to 23 and the last; cluster 320, of the hole; zeros are told and not read.
    let read = 6 * CLUSTER + LENGTH % CLUSTER;
    assert_eq!(number(&made, "read"), read, "{made:#}");
    assert!(number(&made, "stored") < 3 * CLUSTER, "{made:#}");
    assert_holds(&site, "vm@2", "disk-0", content);

    // It goes on, over the point that is not the newest any more: what was written since then is read, and what is known is
    // not stored again.
    recovered.writes("disk-0", &["write -P 6 2M 64k", "flush"]);
    content[2 << 20..(2 << 20) + CLUSTER].fill(6);
    let made = recovered.backup("vm", &[&recovered.uri("disk-0")]);
    assert_eq!((&made["disks"][0]["claim"]["since"], &made["warnings"]), (&json!(1), &json!([])), "{made:#}");
    assert_eq!(number(&made, "read"), read + CLUSTER, "{made:#}");
    assert!(number(&made, "stored") < CLUSTER, "{made:#}");
    assert_holds(&site, "vm@3", "disk-0", content);
    // The samples that are asked for are read, and found as they are said to be.
    let words = ["backup", "--json", "vm", &recovered.uri("disk-0"), "--check-unchanged", "50"];
    let made = site.reseal(words).ok().json();
    assert!(made["disks"][0]["claim"]["checked"].as_u64().unwrap() > 100 * CLUSTER as u64, "{made:#}");
    assert_eq!(made["warnings"], json!([]));
    recovered.stop();
    // The overlay that is opened again tells the same.
    let recovered = Recovered::start(&site, "vm@1");
    let made = recovered.backup("vm", &[&recovered.uri("disk-0")]);
    assert_eq!(number(&made, "read"), read + CLUSTER, "{made:#}");
    assert_holds(&site, "vm@5", "disk-0", content);
    recovered.stop();
    let (site, contents) = (&site, &mut contents);
    fs::write(site.disk("disk-0"), &contents[0]).unwrap();
    assert_eq!(number(&site.backup("vm", &site.disk("disk-0")), "stored"), 0, "all of it was there");
    site.verify();
}

#[test]
fn what_lies_over_another_point_or_another_disk_is_read_whole_and_is_right() {
    let (site, mut contents) = site(&["root", "data"]);
    let recovered = Recovered::start(&site, "vm@1");
    recovered.writes("root", &["write -P 7 1M 64k", "flush"]);
    recovered.writes("data", &["write -P 8 2M 64k", "flush"]);
    contents[0][1 << 20..(1 << 20) + CLUSTER].fill(7);
    contents[1][2 << 20..(2 << 20) + CLUSTER].fill(8);
    let (root, data) = (recovered.uri("root"), recovered.uri("data"));
    let whole = 2 * (LENGTH - 50 * CLUSTER);
    // Both disks, each over its own.
    let made = recovered.backup("vm", &[&format!("root={root}"), &format!("data={data}")]);
    assert_eq!((number(&made, "read"), &made["warnings"]), (2 * CLUSTER, &json!([])), "{made:#}");
    // Exchanged.
    let made = recovered.backup("vm", &[&format!("root={data}"), &format!("data={root}")]);
    let warnings = made["warnings"].to_string();
    assert!(warnings.contains("root: everything was read: it lies over another disk than root of vm@1"), "{made:#}");
    assert_eq!(number(&made, "read"), whole, "{made:#}");
    assert_holds(&site, "vm@3", "root", &contents[1]);
    assert_holds(&site, "vm@3", "data", &contents[0]);
    // A VM of another name: one that has no such point, and one whose first is another one.
    let disks = [format!("root={root}"), format!("data={data}")];
    let disks = [&*disks[0], &*disks[1]];
    let made = recovered.backup("lab", &disks);
    assert_eq!((number(&made, "read"), &made["warnings"]), (whole, &json!([])), "{made:#}");
    assert!(number(&made, "stored") < CLUSTER, "all of it is known: {made:#}");
    let made = recovered.backup("lab", &disks);
    assert!(made["warnings"].to_string().contains("it lies over another disk than root of lab@1"), "{made:#}");
    assert_eq!(number(&made, "read"), whole, "{made:#}");
    for (point, disk, nth) in [("vm@2", "root", 0), ("vm@2", "data", 1), ("lab@1", "root", 0), ("lab@2", "data", 1)] {
        assert_holds(&site, point, disk, &contents[nth]);
    }
    recovered.stop();
    site.verify();
}
