//! A KMS that is down, sealed, or refuses: what runs goes on, what begins says so in time, and works again when it does.
#![allow(clippy::unwrap_used)] // helpers of tests end where they meet what they did not expect

mod servers;

use std::fs::{self, File};
use std::io::Read;
use std::path::{Path, PathBuf};
use std::thread::{self, sleep};
use std::time::{Duration, Instant};

use reseal_tests::mounting::Mounted;
use reseal_tests::random::Random;
use reseal_tests::site::Site;
use serde_json::json;

use servers::bao::{Bao, shared};
use servers::pki::Pki;
use servers::pykmip::PyKmip;
use servers::{Config, private_file};

/// Bytes of a disk: at 2 MiB a second, a backup of it takes seconds.
const DISK: usize = 8 << 20;
/// How long a command may try before it gives up: a few attempts with pauses, on a busy machine.
const SOON: Duration = Duration::from_secs(20);

/// Writes a disk whose content depends on the seed.
fn disk(site: &Site, name: &str, seed: u64) -> (PathBuf, Vec<u8>) {
    let path = site.disk(&format!("{name}.raw"));
    let content = Random::new(seed).bytes(DISK);
    fs::write(&path, &content).unwrap();
    (path, content)
}

/// Each command that begins now fails in time, and says all of this.
#[track_caller]
fn none_begins(site: &Site, tenant: &str, said: &[&str]) {
    let (path, _) = disk(site, "not-read", 1);
    let (folder, out) = (site.path("not-mounted"), site.path("never.raw"));
    fs::create_dir_all(&folder).unwrap();
    let tenant_named = format!("tenant {tenant}");
    for words in [
        &["mount", folder.to_str().unwrap()][..],
        &["backup", "vm", path.to_str().unwrap()],
        &["restore", "--disk", "disk-0", "vm@1", out.to_str().unwrap()],
        &["verify"],
    ] {
        let began = Instant::now();
        site.reseal_of(tenant, words).fails(4, &[&[tenant_named.as_str()][..], said].concat());
        assert!(began.elapsed() < SOON, "{words:?} took {:?}", began.elapsed());
    }
    assert!(!out.exists() && fs::read_dir(&folder).unwrap().next().is_none());
}

#[track_caller]
fn assert_opens(site: &Site, tenant: &str, content: &[u8]) {
    site.reseal_of(tenant, ["verify"]).ok();
    let out = site.path("restored.raw");
    site.reseal_of(tenant, ["restore", "--disk", "disk-0", "vm@latest", out.to_str().unwrap()]).ok();
    assert!(fs::read(&out).unwrap() == content, "the disk of {tenant} differs");
    fs::remove_file(&out).unwrap();
    let mounted = Mounted::new(site, "mounted-again", &["--tenant", tenant]);
    assert!(fs::read(mounted.path.join("vm/latest/disk-0.raw")).unwrap() == content);
    mounted.umount(site);
}

/// Reads a file from its beginning to its end, slowly.
fn read_slowly(path: &Path, over: Duration) -> Vec<u8> {
    let (mut file, mut content) = (File::open(path).unwrap(), Vec::new());
    let mut piece = vec![0; DISK / 64];
    loop {
        let length = file.read(&mut piece).unwrap();
        if length == 0 {
            return content;
        }
        content.extend_from_slice(&piece[..length]);
        sleep(over / 64);
    }
}

#[test]
fn what_runs_when_its_kms_goes_down_runs_to_its_end() {
    let (mut bao, pki) = (Bao::start(), Pki::new());
    let mut kmip = PyKmip::start(&pki);
    let mut site = Site::bare();
    let config = Config::default().bao("site-bao", &bao).kmip("hsm", &pki, &kmip);
    config.tenant("acme = \"site-bao\"").tenant("initech = \"hsm\"").write(&mut site);
    let tenants = ["acme", "initech"];
    site.reseal_of("acme", ["init", "--no-recovery"]).ok();
    site.reseal(["tenant", "add", "initech", "--no-recovery"]).ok();
    let olds = tenants.map(|tenant| {
        let (path, old) = disk(&site, tenant, 10 + tenant.len() as u64);
        site.reseal_of(tenant, ["backup", "vm", path.to_str().unwrap()]).ok();
        old
    });
    let mounts = tenants.map(|tenant| Mounted::new(&site, &format!("mnt-{tenant}"), &["--tenant", tenant]));
    let firsts = mounts.each_ref().map(|mounted| fs::canonicalize(mounted.path.join("vm/latest")).unwrap());

    let news = tenants.map(|tenant| disk(&site, tenant, 20 + tenant.len() as u64));
    let [one, two] = [0, 1].map(|nth| {
        let path = news[nth].0.to_str().unwrap();
        site.start(["--tenant", tenants[nth], "backup", "--limit-rate", "2M", "vm", path])
    });
    let began = Instant::now();
    // Who says what he makes has his keys.
    let has_begun = |tenant: &str| {
        let leases = fs::read_dir(site.folder_of(tenant).join("leases")).unwrap();
        leases.flatten().any(|entry| entry.path().extension().is_some_and(|kind| kind == "lease"))
    };
    while !tenants.iter().all(|tenant| has_begun(tenant)) {
        assert!(began.elapsed() < SOON && !one.has_ended() && !two.has_ended(), "the backups do not begin");
        sleep(Duration::from_millis(5));
    }
    let readers =
        firsts.map(|folder| thread::spawn(move || read_slowly(&folder.join("disk-0.raw"), Duration::from_secs(3))));
    sleep(Duration::from_millis(300));
    bao.kill();
    kmip.stop();
    assert!(!one.has_ended() && !two.has_ended(), "they should run while the KMS goes");
    assert!(readers.iter().all(|reader| !reader.is_finished()), "they should read while the KMS goes");
    for (reader, old) in readers.into_iter().zip(&olds) {
        assert!(reader.join().unwrap() == *old, "a mount without its KMS reads something else");
    }
    for (run, tenant) in [one, two].into_iter().zip(tenants) {
        run.wait().ok();
        assert!(site.folder_of(tenant).join("vms/vm/00000002.manifest").exists(), "the backup of {tenant} committed");
    }
    // What was committed meanwhile appears in mounts that were made before.
    for (mounted, (_, new)) in mounts.iter().zip(&news) {
        assert!(fs::read(mounted.path.join("vm/latest/disk-0.raw")).unwrap() == *new);
    }
    let (bao_at, kmip_at) = (format!("https://localhost:{}", bao.port()), format!("127.0.0.1:{}", kmip.port()));
    none_begins(&site, "acme", &[bao_at.as_str(), "can't be reached", "try again"]);
    none_begins(&site, "initech", &[kmip_at.as_str(), "can't be reached", "try again"]);

    bao.start_again();
    none_begins(&site, "acme", &[bao_at.as_str(), "is sealed", "unseal it, then try again"]);
    bao.unseal();
    kmip.run();
    for (tenant, (_, new)) in tenants.iter().zip(&news) {
        assert_opens(&site, tenant, new);
    }
    // Sealed while all is well, too.
    bao.seal();
    none_begins(&site, "acme", &["is sealed"]);
    assert!(fs::read(mounts[0].path.join("vm/latest/disk-0.raw")).unwrap() == news[0].1);
    mounts.into_iter().for_each(|mounted| drop(mounted.umount(&site)));
}

#[test]
fn a_token_that_is_not_allowed_is_said_until_it_is() {
    let bao = shared();
    let mount = bao.mount();
    let mut site = Site::bare();
    let token = bao.token(&mount, json!({"ttl": "1h"}));
    let file = private_file(&site.path("token"), &token);
    Config::default().bao_by_token("bao", bao, &mount, &file).tenant("acme = \"bao\"").write(&mut site);
    site.reseal_of("acme", ["init", "--no-recovery"]).ok();
    let (path, content) = disk(&site, "disk", 10);
    site.reseal_of("acme", ["backup", "vm", path.to_str().unwrap()]).ok();
    let address = format!("https://localhost:{}", bao.port());
    let remedy = ["refuses to unwrap", &address, "see that the credentials are valid and allow it"];
    // One that was revoked, and one that may use another engine's keys only.
    bao.revoke_tokens_of(&mount);
    none_begins(&site, "acme", &remedy);
    let elsewhere = bao.token(&bao.mount(), json!({"ttl": "1h"}));
    fs::write(&file, &elsewhere).unwrap();
    none_begins(&site, "acme", &remedy);
    let said = site.reseal_of("acme", ["verify"]).said();
    assert!(!said.contains(&token) && !said.contains(&elsewhere), "{said}");
    fs::write(&file, bao.token(&mount, json!({"ttl": "1h"}))).unwrap();
    assert_opens(&site, "acme", &content);
}
