//! A tenant gets new keys while processes of it go on: they learn them, and nothing is called damaged.
#![allow(clippy::unwrap_used)] // helpers of tests end where they meet what they did not expect

mod common;

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use common::Victim;
use reseal_format::layout;
use reseal_format::tenant::TenantRecord;
use reseal_format::time::Timestamp;
use reseal_store::{Local, Store};
use reseal_tests::faults::{Forgetful, Operation, Watched};
use reseal_tests::library::{LibraryDisk, backup, vm};
use reseal_tests::moody::{Mood, MoodyKms};
use reseal_tests::mounting::Mounted;
use reseal_tests::random::Random;
use reseal_tests::rekeying::Rekeying;
use reseal_tests::site::Site;
use reseal_vault::disk::{DiskReader, Tools};
use reseal_vault::{Class, Tenant, VaultError, Wait};
use reseal_writer::BackupError;
use reseal_writer::verify::{Report, Verify, What};

/// Longer than a KMS that failed is left alone.
const PATIENCE: Duration = Duration::from_secs(20);

const RECORD: &str = "tenants/default/tenant.json";

fn disk_of(tenant: &Arc<Tenant>, number: u32) -> Result<Vec<u8>, VaultError> {
    LibraryDisk::open(tenant, "vm", number, "disk-0")?.all()
}

/// Every live point has the disk that was backed up, and every sealed object opens.
#[track_caller]
fn assert_reads(victim: &Victim, tenant: &Arc<Tenant>) {
    for number in [1, 2, 4] {
        let right = fs::read(victim.disk(number as usize - 1)).unwrap();
        assert!(disk_of(tenant, number).unwrap() == right, "vm@{number}");
    }
    assert_eq!(tenant.tombstone(&vm("vm"), 3).unwrap().reason, "a test");
    let mut notes = 0;
    for entry in tenant.store().list(&layout::notes(tenant.name(), &vm("vm"))).unwrap() {
        let (number, id) = layout::parse_note_file(&entry.name).unwrap();
        assert_eq!(tenant.note(&vm("vm"), number, id).unwrap().kind, "boot-verdict");
        notes += 1;
    }
    assert_eq!(notes, 2);
}

fn verify(victim: &Victim, tenant: &Arc<Tenant>) -> Result<Report, BackupError> {
    let heads = victim.site.heads(tenant);
    // One thread, so that operations come in the same order each time.
    Verify::new(tenant.clone(), &heads, Path::new("/dev/null/no-lookup")).run(&What::Everything, 1, |_| (), &|_| ())
}

#[track_caller]
fn assert_undamaged(victim: &Victim, tenant: &Arc<Tenant>) {
    assert_eq!(verify(victim, tenant).unwrap().damaged, []);
}

/// Packs that a point is read from.
fn packs_of(victim: &Victim, number: u32) -> Vec<String> {
    let store = Arc::new(Watched::new(victim.site.store()));
    let tenant = victim.site.tenant_in(store.clone()).unwrap();
    disk_of(&tenant, number).unwrap();
    let read = store.take_log().into_iter().filter(|(operation, _)| *operation == Operation::ReadTail);
    read.map(|(_, key)| key).collect()
}

#[test]
fn one_thread_asks_the_kms_for_all_that_need_the_new_keys() {
    let victim = Victim::new();
    let kms = MoodyKms::new(&victim.site);
    let tenant = victim.site.tenant_of(victim.site.store(), kms.clone()).unwrap();
    assert_eq!(kms.take_asked(), 1);
    kms.set(Mood { takes: Duration::from_millis(300), is_away: false });
    for round in 1..=3 {
        Rekeying::all(&victim.site);
        thread::scope(|scope| {
            let readers: Vec<_> = (0..8).map(|_| scope.spawn(|| assert_reads(&victim, &tenant))).collect();
            readers.into_iter().for_each(|reader| reader.join().unwrap());
        });
        assert_eq!(kms.take_asked(), 1);
        assert_eq!(tenant.record_generation(), 1 + 2 * u64::from(round));
        assert_eq!(tenant.keys().epochs().collect::<Vec<_>>(), [round + 1]);
    }
    assert_eq!(verify(&victim, &tenant).unwrap().damaged, []);
    victim.assert_whole();
    // What is deduplicated against are the packs as they are now.
    let packs = victim.site.packs(1).len();
    victim.site.backup("other", Path::new(victim.disk(3)));
    assert_eq!(victim.site.packs(1).len(), packs, "nothing was stored again");
    victim.site.verify();
}

#[test]
fn without_its_kms_a_process_reads_what_its_keys_open_and_calls_nothing_damaged() {
    let victim = Victim::new();
    let kms = MoodyKms::new(&victim.site);
    let tenant = victim.site.tenant_of(victim.site.store(), kms.clone()).unwrap();
    let before = packs_of(&victim, 1);
    let mut rekeying = Rekeying::new(&victim.site);
    rekeying.begin();
    let manifest = "tenants/default/vms/vm/00000004.manifest".to_owned();
    let later = victim.packs().into_iter().filter(|key| !before.contains(key));
    later.chain([manifest]).for_each(|key| rekeying.renew(&key));
    let right = fs::read(victim.disk(0)).unwrap();

    kms.take_asked();
    kms.set(Mood { is_away: true, takes: Duration::ZERO });
    let began = Instant::now();
    for _ in 0..30 {
        for number in [2, 4] {
            let error = disk_of(&tenant, number).unwrap_err();
            assert!(matches!(error, VaultError::NoNewKeys { .. }), "{error:?}");
            assert_eq!((error.class(), error.damaged_object()), (Class::Unreachable, None));
        }
        assert!(disk_of(&tenant, 1).unwrap() == right);
    }
    let asked = kms.take_asked();
    assert!((1..=1 + began.elapsed().as_secs() / 2).contains(&asked), "{asked} times in {:?}", began.elapsed());
    let error = verify(&victim, &tenant).unwrap_err();
    assert!(matches!(error, BackupError::Vault(VaultError::NoNewKeys { .. })), "{error:?}");
    let error = backup(&tenant, &victim.site.heads(&tenant), "vm", Path::new(victim.disk(0))).unwrap_err();
    assert!(matches!(error, BackupError::Vault(VaultError::NoNewKeys { .. })), "{error:?}");

    // One that takes long to fail makes one reader wait, not all.
    kms.set(Mood { is_away: true, takes: Duration::from_secs(4) });
    thread::sleep(Duration::from_secs(2));
    thread::scope(|scope| {
        let waiting = scope.spawn(|| disk_of(&tenant, 4).unwrap_err());
        thread::sleep(Duration::from_millis(500));
        let began = Instant::now();
        disk_of(&tenant, 4).unwrap_err();
        assert!(disk_of(&tenant, 1).unwrap() == right);
        assert!(began.elapsed() < Duration::from_secs(2), "{:?}", began.elapsed());
        assert!(!waiting.is_finished());
        waiting.join().unwrap();
    });

    kms.set(Mood::default());
    let began = Instant::now();
    while disk_of(&tenant, 4).is_err() {
        assert!(began.elapsed() < PATIENCE);
        thread::sleep(Duration::from_millis(100));
    }
    assert_reads(&victim, &tenant);
    assert_eq!(verify(&victim, &tenant).unwrap().damaged, []);
}

#[test]
fn who_must_not_wait_asks_no_kms() {
    let victim = Victim::new();
    let kms = MoodyKms::new(&victim.site);
    let tenant = victim.site.tenant_of(victim.site.store(), kms.clone()).unwrap();
    let disk = tenant.point(&vm("vm"), 1).unwrap().manifest.disks.remove(0);
    Rekeying::all(&victim.site);
    kms.take_asked();
    let reader = DiskReader::new(tenant, 8 << 20);
    let read = |wait| reader.read(&disk, 0, &mut [0; 4096], wait, &mut Tools::new());
    for _ in 0..3 {
        assert!(matches!(read(Wait::MustNot), Err(VaultError::WouldBlock)));
    }
    assert_eq!(kms.take_asked(), 0);
    read(Wait::May).unwrap();
    read(Wait::MustNot).unwrap();
    assert_eq!(kms.take_asked(), 1);
}

#[test]
fn a_record_is_taken_up_only_if_it_follows_the_one_before() {
    let victim = Victim::new();
    let kms = MoodyKms::new(&victim.site);
    let tenant = victim.site.tenant_of(victim.site.store(), kms.clone()).unwrap();
    let first = victim.read(RECORD);
    kms.take_asked();
    assert!(!tenant.refresh().unwrap());
    assert_eq!(kms.take_asked(), 0, "for the same record there is nothing to ask");
    let key = tenant.kms().key;
    victim.site.reseal(["rekey", "--kek"]).ok();
    assert!(tenant.refresh().unwrap());
    assert_eq!((kms.take_asked(), tenant.record_generation()), (1, 2));
    assert_ne!(tenant.kms().key, key);

    let second = victim.read(RECORD);
    victim.write(RECORD, &first);
    assert!(matches!(tenant.refresh(), Err(VaultError::Rollback { seen: 2, now: 1, .. })));
    let changed = |field: &str, from: &str, to: &str| {
        let text = String::from_utf8(second.clone()).unwrap();
        assert!(text.contains(from), "{field}");
        text.replace("\"generation\": 2", "\"generation\": 3").replace(from, to).into_bytes()
    };
    victim.write(RECORD, &changed("kind", "\"kind\": \"keyring\"", "\"kind\": \"vault\""));
    let moved = tenant.refresh().unwrap_err();
    assert!(matches!(moved, VaultError::MovedKms { .. }) && moved.to_string().contains("anew"), "{moved}");
    victim.site.reseal(["tenant", "add", "other", "--no-recovery"]).ok();
    victim.write(RECORD, &victim.read("tenants/other/tenant.json"));
    let other = tenant.refresh().unwrap_err();
    assert!(other.damaged_object() == Some(RECORD) && other.to_string().contains("another tenant"), "{other}");
    victim.write(RECORD, &TenantRecord::decode(&second).unwrap().erase(Timestamp(7)).unwrap().encode());
    assert!(matches!(tenant.refresh(), Err(VaultError::Erased { when: Timestamp(7), .. })));
    fs::remove_file(victim.site.vault.join(RECORD)).unwrap();
    assert!(matches!(tenant.refresh(), Err(VaultError::Missing { .. })));
    assert_eq!(kms.take_asked(), 0, "none of these is worth a question");

    // One that only says to be newer is refused by the KMS, and asking again at once is of no use.
    victim.write(RECORD, &changed("nothing", "\"generation\": 2", "\"generation\": 3"));
    for _ in 0..10 {
        let forged = tenant.refresh().unwrap_err();
        assert_eq!(forged.class(), Class::Damaged, "{forged}");
    }
    assert!((1..=2).contains(&kms.take_asked()));
    victim.write(RECORD, &second);
    assert!(!tenant.refresh().unwrap());
    assert_reads(&victim, &tenant);
}

/// Two rotations: what the first had wrapped opens no more when it is asked for.
#[test]
fn a_rotation_while_the_kms_is_asked_is_no_failure() {
    let victim = Victim::new();
    let store = Arc::new(Watched::new(victim.site.store()));
    let tenant = victim.site.tenant_in(store.clone()).unwrap();
    victim.site.reseal(["rekey", "--kek"]).ok();
    let second = victim.read(RECORD);
    victim.site.reseal(["rekey", "--kek"]).ok();
    let third = victim.read(RECORD);
    victim.write(RECORD, &second);
    let (vault, reads) = (victim.site.vault.clone(), AtomicUsize::new(0));
    store.meanwhile(move |operation, key| {
        if operation == Operation::Get && key == RECORD && reads.fetch_add(1, Ordering::SeqCst) == 1 {
            fs::write(vault.join(RECORD), &third).unwrap();
        }
    });
    assert!(tenant.refresh().unwrap());
    assert_eq!(tenant.record_generation(), 3);
    assert_reads(&victim, &tenant);
}

/// A reader that was slow: what it holds was sealed anew since, and its keys were replaced by another thread.
#[test]
fn what_was_read_before_its_key_went_is_read_again() {
    let victim = Victim::new();
    let store = Arc::new(Watched::new(victim.site.store()));
    let tenant = victim.site.tenant_in(store.clone()).unwrap();
    let sealed: Vec<_> = victim.sealed().into_iter().map(|key| (victim.read(&key), key)).collect();
    Rekeying::all(&victim.site);
    assert!(tenant.refresh().unwrap());
    let mut renewed = Vec::new();
    for (old, key) in sealed {
        renewed.push((key.clone(), victim.read(&key)));
        victim.write(&key, &old);
    }
    let (vault, asked) = (victim.site.vault.clone(), Arc::new(AtomicUsize::new(0)));
    let count = asked.clone();
    let mut before = String::new();
    store.meanwhile(move |_, key| {
        // The second time in a row, for what is read anew in between is the record.
        if before == key
            && let Some((_, new)) = renewed.iter().find(|(other, _)| other == key)
        {
            fs::write(vault.join(key), new).unwrap();
            count.fetch_add(1, Ordering::SeqCst);
        }
        if key != RECORD {
            before = key.to_owned();
        }
    });
    assert_reads(&victim, &tenant);
    assert_eq!(asked.load(Ordering::SeqCst), 6, "three manifests, a tombstone, two notes");
}

/// Both kinds of stores: one that reads on in what was removed, and one that can't.
fn stores(site: &Site) -> [Arc<dyn Store>; 2] {
    [Arc::new(Local::new(&site.vault)), Arc::new(Forgetful::new(&site.vault))]
}

/// Does `work` again and again, each time with all keys and objects replaced before another of its operations.
fn interrupted_everywhere(work: impl Fn(&Victim, &Arc<Tenant>)) {
    let victim = Arc::new(Victim::new());
    for inner in stores(&victim.site) {
        for nth in 0.. {
            let store = Arc::new(Watched::new(inner.clone()));
            let tenant = victim.site.tenant_in(store.clone()).unwrap();
            let (done, shared) = (Arc::new(AtomicUsize::new(0)), victim.clone());
            let count = done.clone();
            store.meanwhile(move |_, _| {
                if count.fetch_add(1, Ordering::SeqCst) == nth {
                    Rekeying::all(&shared.site);
                }
            });
            work(&victim, &tenant);
            if done.load(Ordering::SeqCst) <= nth {
                assert!(nth > 20, "only {nth} operations were interrupted");
                break;
            }
        }
    }
    victim.assert_whole();
}

#[test]
fn readers_that_are_interrupted_anywhere_read_on() {
    interrupted_everywhere(assert_reads);
}

#[test]
fn a_verification_that_is_interrupted_anywhere_finds_no_damage() {
    interrupted_everywhere(assert_undamaged);
}

/// Here the old keys stay: who replaces them waits for backups.
#[test]
fn a_backup_that_is_interrupted_by_rewriting_makes_a_whole_point() {
    let victim = Arc::new(Victim::new());
    for nth in (0..200).step_by(7) {
        let store = Arc::new(Watched::new(Arc::new(Forgetful::new(&victim.site.vault))));
        let tenant = victim.site.tenant_in(store.clone()).unwrap();
        let (done, shared) = (Arc::new(AtomicUsize::new(0)), victim.clone());
        let count = done.clone();
        store.meanwhile(move |_, _| {
            if count.fetch_add(1, Ordering::SeqCst) == nth {
                let mut rekeying = Rekeying::new(&shared.site);
                rekeying.begin();
                let objects = shared.site.objects().into_iter().filter(|key| !key.starts_with("tmp/"));
                objects.for_each(|key| rekeying.renew(&key));
            }
        });
        let disk = Path::new(victim.disk(nth % 4));
        let made = backup(&tenant, &victim.site.heads(&tenant), "vm", disk).unwrap();
        let read = LibraryDisk::open(&tenant, "vm", made.number, "disk-0").unwrap().all().unwrap();
        assert!(read == fs::read(disk).unwrap(), "operation {nth}");
        if done.load(Ordering::SeqCst) <= nth {
            assert!(nth > 20, "only {nth} operations were interrupted");
            break;
        }
    }
    victim.site.verify();
}

#[test]
fn a_generation_that_is_replaced_before_it_is_opened_is_no_damage() {
    let victim = Arc::new(Victim::new());
    Rekeying::all(&victim.site);
    let store = Arc::new(Watched::new(Arc::new(Forgetful::new(&victim.site.vault))));
    let tenant = victim.site.tenant_in(store.clone()).unwrap();
    let (rekeying, rewritten) = (Rekeying::new(&victim.site), Arc::new(AtomicUsize::new(0)));
    let (count, vault) = (rewritten.clone(), victim.site.vault.clone());
    store.meanwhile(move |operation, key| {
        // The first is one that nobody has; then one that was found by a listing.
        let found = key.ends_with(".1") || key.ends_with(".2");
        if operation == Operation::ReadTail && found && vault.join(key).exists() {
            rekeying.rewrite(key);
            count.fetch_add(1, Ordering::SeqCst);
        }
    });
    assert_reads(&victim, &tenant);
    assert!(rewritten.load(Ordering::SeqCst) >= 8);
}

/// A listing that is made while one generation takes the place of another may show neither.
#[test]
fn a_pack_that_a_listing_missed_is_looked_for_again() {
    let victim = Victim::new();
    Rekeying::all(&victim.site);
    let checks: [fn(&Victim, &Arc<Tenant>); 2] = [assert_reads, assert_undamaged];
    for check in checks {
        let store = Arc::new(Watched::new(Arc::new(Forgetful::new(&victim.site.vault))));
        let tenant = victim.site.tenant_in(store.clone()).unwrap();
        let (vault, mut hidden) = (victim.site.vault.clone(), None);
        let (times, elsewhere) = (Arc::new(AtomicUsize::new(0)), victim.site.path("hidden"));
        let (count, mut had) = (times.clone(), BTreeSet::new());
        store.meanwhile(move |operation, key| {
            if let Some((from, to)) = hidden.take() {
                fs::rename::<PathBuf, PathBuf>(to, from).unwrap();
            }
            let is_shelf = operation == Operation::List && key.contains("/packs/") && !key.ends_with("/packs/");
            // Each once: several ask beside each other, so the next listing may be anybody's.
            if is_shelf && had.insert(key.to_owned()) {
                let from = fs::read_dir(vault.join(key)).unwrap().next().unwrap().unwrap().path();
                fs::rename(&from, &elsewhere).unwrap();
                hidden = Some((from, elsewhere.clone()));
                count.fetch_add(1, Ordering::SeqCst);
            }
        });
        check(&victim, &tenant);
        assert!(times.load(Ordering::SeqCst) > 3);
    }
}

#[test]
fn a_mount_learns_new_keys_and_outlasts_a_kms_that_is_away() {
    let site = Site::new();
    let content = |seed: u64, name: &str| {
        let (bytes, path) = (Random::new(seed).bytes(300_000), site.disk(name));
        fs::write(&path, &bytes).unwrap();
        site.backup(name, &path);
        bytes
    };
    let first = content(1, "first");
    let before = site.objects();
    let second = content(2, "second");
    let mounted = Mounted::new(&site, "mnt", &[]);
    let [one, two] = ["first", "second"].map(|name| mounted.point(&site, name, 1).join("disk-0.raw"));

    // Moved away before anything is done: a mount looks at the record by itself.
    let (copy, away) = (site.path("keys/copy.json"), site.path("keys/away.json"));
    fs::copy(&site.keyring, &copy).unwrap();
    fs::rename(&site.keyring, &away).unwrap();
    let mut rekeying = Rekeying::with_keyring(&site, &copy);
    rekeying.begin();
    let (old, new): (Vec<_>, Vec<_>) = site.objects().into_iter().partition(|key| before.contains(key));
    new.iter().for_each(|key| rekeying.renew(key));
    for _ in 0..4 {
        assert!(fs::read(&one).unwrap() == first);
        assert_eq!(fs::read(&two).unwrap_err().raw_os_error(), Some(libc::EIO));
        thread::sleep(Duration::from_secs(2));
    }
    fs::rename(&away, &site.keyring).unwrap();
    let began = Instant::now();
    while fs::read(&two).is_err() {
        assert!(began.elapsed() < PATIENCE);
        thread::sleep(Duration::from_millis(100));
    }
    old.iter().for_each(|key| rekeying.renew(key));
    rekeying.end();
    assert!(fs::read(&one).unwrap() == first && fs::read(&two).unwrap() == second);
    let ended = mounted.umount(&site).ok();
    let complaints = ended.stderr.matches("The mount goes on with the keys that it has").count();
    assert_eq!(complaints, 1, "{ended:#?}");
}
