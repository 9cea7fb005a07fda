//! New keys for a tenant with many restore points: how long it takes, and how many objects of the vault it touches.

#[path = "../../../tests/servers/mod.rs"]
#[allow(clippy::unwrap_used)] // what the tests start ends where it meets what it did not expect
mod servers;

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsStr;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::Command;

use reseal_tests::random::Random;
use reseal_tests::site::{Site, files_below};

use crate::Result;
use crate::contender::Contender;
use crate::host::{DAYS, Disks};
use crate::live::{Figure, median};
use crate::plan::Plan;
use crate::process;
use crate::reseal::Reseal;
use crate::samples::Samples;
use servers::Config;
use servers::bao::Bao;
use servers::pki::Pki;
use servers::pykmip::PyKmip;

/// Restore points of each tenant, of a disk of so many bytes of which one cluster changes.
const POINTS: usize = 100;
const DISK: usize = 1 << 20;
const CLUSTER: usize = 64 << 10;
/// Seconds that it may take.
const MOST: f64 = 2.0;

/// Each tenant, and where its key is.
const TENANTS: [(&str, &str); 3] = [("local", "the keyring"), ("acme", "OpenBao"), ("initech", "PyKMIP")];

pub(crate) fn take(plan: &Plan, disks: &Disks, samples: &mut Samples) -> Result<()> {
    if !samples.describes("reseal") {
        return Ok(());
    }
    eprintln!("bench: new keys");
    samples.rekey.clear();
    let (bao, pki) = (Bao::start(), Pki::new());
    let kmip = PyKmip::start(&pki);
    let mut site = Site::bare();
    let config = Config::default().bao("bao", &bao).kmip("hsm", &pki, &kmip);
    config.tenant("acme = \"bao\"").tenant("initech = \"hsm\"").write(&mut site);
    let config = site.kms_config.clone().ok_or("the servers have no configuration")?;
    let mut reseal = Reseal::at(plan, "reseal-rekey");
    reseal.renew()?;
    let command = |words: &[&OsStr]| {
        let mut command = reseal.command();
        command.env("RESEAL_KMS_CONFIG", &config).args(words);
        command
    };
    let disk = site.disk("disk.raw");
    for (tenant, place) in TENANTS {
        process::run(&mut command(&["tenant", "add", tenant, "--no-recovery"].map(OsStr::new)))?;
        let mut content = Random::new(1).bytes(DISK);
        for point in 0..POINTS {
            let at = point * CLUSTER % DISK;
            content[at..at + CLUSTER].copy_from_slice(&Random::new(2 + point as u64).bytes(CLUSTER));
            fs::write(&disk, &content)?;
            let words = ["--tenant", tenant, "backup", "vm"].map(OsStr::new);
            process::run(&mut command(&[&words[..], &[disk.as_os_str()]].concat()))?;
        }
        let mut seconds = Vec::new();
        let mut touched = 0;
        let mut objects = 0;
        for _ in 0..plan.rounds.max(3) {
            let before = files(&reseal.repository())?;
            seconds.push(process::run(&mut command(&["--tenant", tenant, "rekey", "--kek"].map(OsStr::new)))?.seconds);
            let after = files(&reseal.repository())?;
            let differs = |key: &&String| before.get(*key) != after.get(*key);
            let all: BTreeSet<_> = before.keys().chain(after.keys()).collect();
            touched = touched.max(all.into_iter().filter(differs).count());
            let own = format!("/tenants/{tenant}/");
            objects = after.keys().filter(|key| key.contains(&own)).count();
        }
        let median = median(seconds);
        samples.rekey.push(Figure {
            what: format!("`rekey --kek` of a tenant of {POINTS} restore points whose key is in {place}"),
            bound: format!("at most {MOST:.0} s, 1 object"),
            measured: format!("{median:.3} s, {touched} of {objects} objects"),
            met: Some(median <= MOST && touched == 1),
        });
    }
    samples.rekey.push(data(plan, disks)?);
    Ok(())
}

/// Everything sealed again, beside what a copy of the vault takes.
fn data(plan: &Plan, disks: &Disks) -> Result<Figure> {
    let mut reseal = Reseal::at(plan, "reseal-rekey-data");
    reseal.renew()?;
    for day in DAYS {
        process::run(reseal.command().args(["backup", "web01"]).arg(disks.path(day)))?;
    }
    let bytes: u64 =
        files_below(&reseal.repository()).iter().map(|path| Ok(fs::metadata(path)?.len())).sum::<Result<u64>>()?;
    let (vault, copy) = (reseal.repository(), plan.work.join("rekey-copy"));
    let (mut sealed, mut copied) = (Vec::new(), Vec::new());
    for _ in 0..plan.rounds.max(3) {
        sealed.push(process::run(reseal.command().args(["rekey", "--data", "--no-recovery"]))?.seconds);
        let script = "cp -r -- \"$1\" \"$2\" && sync -f \"$2\"";
        let words = ["-c".as_ref(), script.as_ref(), "sh".as_ref(), vault.as_os_str(), copy.as_os_str()];
        copied.push(process::run(Command::new("sh").args(words))?.seconds);
        fs::remove_dir_all(&copy)?;
    }
    let (sealed, copied) = (median(sealed), median(copied));
    Ok(Figure {
        what: "`rekey --data` of the three restore points of the Debian disk".to_owned(),
        bound: "reported".to_owned(),
        measured: format!(
            "{sealed:.2} s for {} MiB; a copy of the vault with `cp` and `sync` takes {copied:.2} s",
            bytes >> 20
        ),
        met: None,
    })
}

/// Which file holds each object of the vault, and when it was last changed.
fn files(vault: &Path) -> Result<BTreeMap<String, (u64, i64, i64)>> {
    let mut files = BTreeMap::new();
    for path in files_below(vault) {
        let about = fs::metadata(&path)?;
        files.insert(path.display().to_string(), (about.ino(), about.ctime(), about.ctime_nsec()));
    }
    Ok(files)
}
