//! An image encrypted with LUKS, served by QEMU's storage daemon inside TLS: backed up whole, then by its bitmaps.
#![allow(clippy::unwrap_used)] // helpers of tests end where they meet what they did not expect

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::process::Command;
use std::time::{Duration, Instant};

use reseal_tests::certificates::write_certificates;
use reseal_tests::library::LibraryDisk;
use reseal_tests::model::ModelDisk;
use reseal_tests::mounting::is_mounted;
use reseal_tests::ports::free_port;
use reseal_tests::process::{Run, Running, bound_to_us, start, system};
use reseal_tests::qmp::Qmp;
use reseal_tests::random::Random;
use reseal_tests::site::Site;
use serde_json::{Value, json};

const CLUSTER: u64 = 65_536;
const LENGTH: u64 = 1600 * CLUSTER;
const SECRET: &str = "a secret of the customer's, not of the provider's";

/// The storage daemon with one disk.
struct Daemon {
    site: Site,
    process: Option<Running>,
    port: u16,
    disk: PathBuf,
    model: ModelDisk,
    random: Random,
}

impl Daemon {
    fn start() -> Daemon {
        let site = Site::new();
        write_certificates(&site.path("pki"));
        fs::write(site.path("secret"), SECRET).unwrap();
        let image = site.disk("vm.qcow2");
        let options = "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10,encrypt.hash-alg=sha512";
        let secret = format!("secret,id=s,file={}", site.path("secret").display());
        let create = ["create", "-q", "-f", "qcow2", "--object", &secret, "-o", options];
        // It measures how long a key derivation takes, and now and then finds that it can't.
        let made = (0..20).any(|_| {
            let status = Command::new("qemu-img").args(create).arg(&image).arg(LENGTH.to_string()).status();
            status.unwrap().success()
        });
        assert!(made, "qemu-img makes an encrypted image");
        let port = free_port();
        let disk = site.path("disk.fuse");
        fs::write(&disk, []).unwrap();
        let mut command = Command::new("qemu-storage-daemon");
        command.args(["--object", &secret]);
        let pki = site.path("pki");
        let tls = format!("tls-creds-x509,id=tls,endpoint=server,verify-peer=on,dir={}", pki.display());
        command.args(["--object", &tls]);
        command.args(["--blockdev", &format!("driver=file,node-name=file,filename={}", image.display())]);
        command.args(["--blockdev", "driver=qcow2,node-name=disk,file=file,encrypt.format=luks,encrypt.key-secret=s"]);
        let address = format!("addr.type=inet,addr.host=127.0.0.1,addr.port={port},tls-creds=tls,max-connections=16");
        command.args(["--nbd-server", &address]);
        let monitor = format!("socket,id=m,server=on,wait=off,path={}", site.path("qmp").display());
        command.args(["--chardev", &monitor, "--monitor", "chardev=m"]);
        let process = start(bound_to_us(&mut command));
        let began = Instant::now();
        while !site.path("qmp").exists() {
            assert!(!process.has_ended() && began.elapsed() < Duration::from_secs(20), "{:#?}", process.kill());
            std::thread::sleep(Duration::from_millis(5));
        }
        Daemon { site, process: Some(process), port, disk, model: ModelDisk::new(LENGTH), random: Random::new(5) }
    }

    /// Writes as a guest would: through QEMU. The disk can't be exported for reading meanwhile.
    fn write(&mut self, at: u64, length: u64) {
        let fuse =
            json!({"type": "fuse", "id": "fuse", "node-name": "disk", "mountpoint": self.disk, "writable": true});
        self.qmp("block-export-add", fuse);
        let bytes = self.random.bytes(usize::try_from(length).unwrap());
        let file = fs::File::options().write(true).open(&self.disk).unwrap();
        file.write_all_at(&bytes, at).unwrap();
        file.sync_all().unwrap();
        drop(file);
        self.model.write(at, &bytes);
        self.unexport("fuse");
    }

    fn qmp(&self, command: &str, arguments: Value) {
        Qmp::connect(&self.site.path("qmp")).run(command, arguments);
    }

    /// A new bitmap begins to record, and the one before stops: what it has is what changed until now.
    fn moment(&self, before: Option<&str>, next: &str) {
        let data = json!({"node": "disk", "name": next, "persistent": true});
        let mut actions = vec![json!({"type": "block-dirty-bitmap-add", "data": data})];
        let data = json!({"node": "disk", "name": before});
        actions.extend(before.map(|_| json!({"type": "block-dirty-bitmap-disable", "data": data})));
        self.qmp("transaction", json!({ "actions": actions }));
    }

    fn export(&self, bitmap: Option<&str>) {
        let mut export = json!({"type": "nbd", "id": "nbd", "node-name": "disk", "name": "vm disk"});
        if let Some(bitmap) = bitmap {
            export["bitmaps"] = json!([bitmap]);
        }
        self.qmp("block-export-add", export);
    }

    fn unexport(&self, id: &str) {
        self.qmp("block-export-del", json!({"id": id, "mode": "hard"}));
        let began = Instant::now();
        while Qmp::connect(&self.site.path("qmp")).run("query-block-exports", json!({})) != json!([]) {
            assert!(began.elapsed() < Duration::from_secs(20), "the export does not end");
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    fn backup(&self, scheme: &str, more: &[&str]) -> Run {
        let pki = |name: &str| self.site.path("pki").join(name).display().to_string();
        let uri = format!("{scheme}://localhost:{}/vm%20disk", self.port);
        let mut words =
            vec!["backup".to_owned(), "--json".into(), "vm".into(), uri, "--source-timeout".into(), "5".into()];
        if scheme == "nbds" {
            let options =
                [("--tls-ca", "ca-cert.pem"), ("--tls-cert", "client-cert.pem"), ("--tls-key", "client-key.pem")];
            words.extend(options.iter().flat_map(|(option, file)| [(*option).to_owned(), pki(file)]));
        }
        words.extend(more.iter().map(|word| (*word).to_owned()));
        self.site.reseal(words)
    }

    #[track_caller]
    fn assert_point(&self, point: &Value) {
        let number = u32::try_from(point["number"].as_u64().unwrap()).unwrap();
        let disk = LibraryDisk::open(&self.site.tenant(), "vm", number, "disk-0").unwrap();
        self.model.assert_same(&disk, &format!("point {number}"));
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        if let Some(process) = self.process.take() {
            process.kill();
        }
        if is_mounted(&self.disk) {
            system("umount", &["-l", self.disk.to_str().unwrap()]);
        }
    }
}

#[test]
fn an_encrypted_image_is_backed_up_over_tls_whole_and_then_by_its_bitmaps() {
    let mut daemon = Daemon::start();
    daemon.write(0, 100 * CLUSTER);
    daemon.write(900 * CLUSTER + 7, 50 * CLUSTER);
    daemon.moment(None, "b1");
    daemon.export(None);
    let full = daemon.backup("nbds", &[]).ok().json();
    assert_eq!(full["stats"]["read"], 151 * CLUSTER, "holes are not read");
    daemon.assert_point(&full);
    // In the clear the server shows nothing, and a bitmap that is not there is said to be so.
    daemon.backup("nbd", &[]).expect(&[2, 4]);
    daemon.backup("nbds", &["--bitmap", "b9", "--since", "vm@1"]).fails(2, &["b9"]);

    let mut since = "b1".to_owned();
    for nth in 2..5u64 {
        daemon.unexport("nbd");
        // Changed data, new data, and new data where there was a hole.
        daemon.write(nth * 10 * CLUSTER, 3 * CLUSTER);
        daemon.write((900 + nth) * CLUSTER + 100, 10);
        daemon.write((1590 + nth) * CLUSTER, 5000);
        let next = format!("b{nth}");
        daemon.moment(Some(&since), &next);
        daemon.export(Some(&since));
        let point =
            daemon.backup("nbds", &["--bitmap", &since, "--since", "vm@latest", "--check-unchanged", "0"]).ok().json();
        assert_eq!(point["stats"]["read"], 5 * CLUSTER, "as much as the bitmap has: {point}");
        let claim =
            json!({"method": "user-bitmap", "id": since, "since": nth - 1, "changed": 5 * CLUSTER, "checked": 0});
        assert_eq!((&point["disks"][0]["claim"], &point["warnings"]), (&claim, &json!([])));
        daemon.assert_point(&point);
        since = next;
    }

    // A bitmap that does not reach back so far: what is checked shows that, and everything is read.
    daemon.unexport("nbd");
    daemon.moment(Some(&since), "b5");
    daemon.export(Some(&since));
    let options = ["--bitmap", &since, "--since", "vm@2", "--check-unchanged", "100"];
    let lied = daemon.backup("nbds", &options).ok().json();
    assert!(lied["warnings"].to_string().contains("user-bitmap b4 was wrong"), "{lied}");
    daemon.assert_point(&lied);
    daemon.site.verify();
}
