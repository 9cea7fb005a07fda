//! Two tenants of one vault, with their keys in one KMS: nothing of the one is of use to the other, whatever whoever holds the
//! storage makes of it.
#![allow(clippy::unwrap_used)] // helpers of tests end where they meet what they did not expect

mod servers;

use std::collections::BTreeSet;
use std::fs;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use reseal_format::ids::BlobId;
use reseal_format::keys::Kind;
use reseal_format::names::TenantName;
use reseal_kms::Keyring;
use reseal_tests::process::Run;
use reseal_tests::random::Random;
use reseal_tests::site::{Site, copy_folder};
use reseal_vault::{Packs, Tenant};
use serde_json::{Value, json};

use servers::Config;
use servers::bao::shared;

/// Clusters of a disk that differ from one another.
const CLUSTERS: usize = 40;
const CLUSTER: usize = 64 << 10;

/// A disk with what compresses, what does not, and what is there twice.
fn disk(site: &Site, seed: u64) -> (PathBuf, Vec<u8>) {
    let path = site.disk(&format!("{seed}.raw"));
    let mut random = Random::new(seed);
    let mut content = random.bytes(CLUSTERS / 2 * CLUSTER);
    for _ in 0..CLUSTERS / 2 {
        let word = random.bytes(32);
        content.extend(word.iter().cycle().take(CLUSTER));
    }
    content.extend_from_within(0..4 * CLUSTER);
    fs::write(&path, &content).unwrap();
    (path, content)
}

fn backup(site: &Site, tenant: &str, vm: &str, disk: &Path) -> Value {
    site.reseal_of(tenant, ["backup", "--json", vm, disk.to_str().unwrap()]).ok().json()
}

fn verify(site: &Site, tenant: &str) -> Run {
    site.reseal_of(tenant, ["verify"])
}

/// What a point's disk is, if it is given out at all.
fn content(site: &Site, tenant: &str, point: &str) -> Option<Vec<u8>> {
    let out = site.path("out.raw");
    let run = site.reseal_of(tenant, ["restore", "--disk", "disk-0", point, out.to_str().unwrap()]);
    let bytes = (run.status == Some(0)).then(|| fs::read(&out).unwrap());
    let _ = fs::remove_file(&out);
    bytes
}

/// Two tenants in the same keyring with points of a VM of the same name; the disks' contents.
fn two_tenants() -> (Site, Vec<u8>, Vec<u8>) {
    let site = Site::bare();
    site.reseal_of("acme", ["init", "--no-recovery"]).ok();
    site.reseal(["tenant", "add", "globex", "--no-recovery"]).ok();
    let ((one, acme), (two, globex)) = (disk(&site, 1), disk(&site, 2));
    backup(&site, "acme", "vm", &one);
    backup(&site, "acme", "web", &one);
    backup(&site, "globex", "vm", &two);
    (site, acme, globex)
}

/// Keys of a tenant's objects of one kind, below its folder.
fn objects(site: &Site, tenant: &str, kind: &str) -> Vec<String> {
    let prefix = format!("tenants/{tenant}/");
    let below = |key: String| key.strip_prefix(&prefix).filter(|key| key.contains(kind)).map(str::to_owned);
    site.objects().into_iter().filter_map(below).collect()
}

#[test]
fn no_object_opens_in_another_tenants_folder_under_any_name() {
    let (site, acme, globex) = two_tenants();
    let (a, g) = (site.folder_of("acme"), site.folder_of("globex"));
    let kept = site.path("kept");
    copy_folder(&g, &kept);
    let restore = || {
        fs::remove_dir_all(&g).unwrap();
        copy_folder(&kept, &g);
    };
    let never_theirs = |point: &str| {
        if let Some(bytes) = content(&site, "globex", point) {
            assert!(bytes == globex, "{point} of globex is something else");
        }
    };
    // Each object in the place of each of the same kind.
    let mut tried = 0;
    for kind in ["/vm/", "packs/"] {
        for theirs in objects(&site, "acme", kind) {
            for own in objects(&site, "globex", kind) {
                fs::copy(a.join(&theirs), g.join(&own)).unwrap();
                verify(&site, "globex").fails(3, &[]);
                assert_eq!(content(&site, "globex", "vm@latest"), None, "{theirs} as {own}");
                fs::copy(kept.join(&own), g.join(&own)).unwrap();
                tried += 1;
            }
        }
    }
    assert!(tried >= 5, "{tried} were exchanged");
    // A manifest as the next restore point, where nothing is in its way.
    fs::copy(a.join("vms/vm/00000001.manifest"), g.join("vms/vm/00000002.manifest")).unwrap();
    let told = verify(&site, "globex").expect(&[3]);
    assert!(told.said().contains("00000002.manifest"), "{told:#?}");
    assert_eq!(content(&site, "globex", "vm@2"), None);
    never_theirs("vm@1");
    restore();
    // Whole VMs, under their own names and others, without and with the packs that they need.
    for packs in [false, true] {
        for (from, to) in [("vm", "vm"), ("web", "vm"), ("vm", "web"), ("web", "web")] {
            if packs {
                for key in objects(&site, "acme", "packs/") {
                    fs::create_dir_all(g.join(&key).parent().unwrap()).unwrap();
                    fs::copy(a.join(&key), g.join(&key)).unwrap();
                }
            }
            let _ = fs::remove_dir_all(g.join("vms").join(to));
            copy_folder(&a.join("vms").join(from), &g.join("vms").join(to));
            verify(&site, "globex").fails(3, &[]);
            assert_eq!(content(&site, "globex", &format!("{to}@1")), None, "{from} as {to}, packs: {packs}");
            never_theirs("vm@1");
            restore();
        }
    }
    // All of it, with or without the record, and the folders exchanged.
    for record in [false, true] {
        let moved = site.path("moved");
        fs::rename(&g, &moved).unwrap();
        copy_folder(&a, &g);
        if !record {
            fs::copy(kept.join("tenant.json"), g.join("tenant.json")).unwrap();
        }
        verify(&site, "globex").fails(3, &[if record { "another tenant's record" } else { "" }]);
        assert_eq!(content(&site, "globex", "vm@1"), None);
        fs::remove_dir_all(&g).unwrap();
        fs::rename(&moved, &g).unwrap();
    }
    for (tenant, own) in [("acme", &acme), ("globex", &globex)] {
        verify(&site, tenant).ok();
        assert_eq!(content(&site, tenant, "vm@1").as_ref(), Some(own));
    }
}

/// The ids of a tenant's data blobs, and the lengths of the packs that they are in.
fn ids(site: &Site, tenant: &str) -> (Vec<BlobId>, Vec<u64>) {
    let keyring = Keyring::open(&site.keyring, |_| Err(std::io::ErrorKind::NotFound.into())).unwrap();
    let name = TenantName::new(tenant).unwrap();
    let packs = Packs::new(Arc::new(Tenant::open(site.store(), "vault", &name, Arc::new(keyring)).unwrap()), 1 << 20);
    let (mut ids, mut lengths) = (Vec::new(), Vec::new());
    for pack in packs.list().unwrap() {
        let handle = packs.open_generation(pack.id, pack.generation).unwrap();
        if handle.trailer().kind == Kind::DataPack {
            lengths.push(pack.length);
            ids.extend(packs.read_ids(&handle).unwrap());
        }
    }
    lengths.sort_unstable();
    (ids, lengths)
}

/// Whoever has the same disk learns from nothing that another tenant has it: not from what is read, counted or stored.
#[test]
fn equal_disks_of_two_tenants_share_nothing_and_cost_the_same() {
    let site = Site::bare();
    site.reseal_of("acme", ["init", "--no-recovery"]).ok();
    site.reseal(["tenant", "add", "globex", "--no-recovery"]).ok();
    let (path, content) = disk(&site, 1);
    let counted = |tenant: &str| {
        let mut stats = backup(&site, tenant, "vm", &path)["stats"].clone();
        // How long it took says as much as the work that was done; what an index has of random ids compresses as it likes.
        for field in ["duration_ms", "stored"] {
            stats.as_object_mut().unwrap().remove(field).unwrap();
        }
        stats
    };
    let (first, second) = (counted("acme"), counted("globex"));
    assert_eq!(first, second);
    assert_eq!(first["new"], CLUSTERS * CLUSTER);
    let ((acme, acme_packs), (globex, globex_packs)) = (ids(&site, "acme"), ids(&site, "globex"));
    assert_eq!((acme.len(), acme_packs), (CLUSTERS, globex_packs));
    let shared: Vec<_> = acme.iter().filter(|id| globex.contains(id)).collect();
    assert!(globex.len() == CLUSTERS && shared.is_empty(), "{} ids of {CLUSTERS} are the same", shared.len());
    // No sealed bytes of the one stand in the other. Trailers are in clear.
    let windows = |tenant: &str| -> BTreeSet<Vec<u8>> {
        let packs = objects(&site, tenant, "packs/");
        let pack = |key: &String| fs::read(site.folder_of(tenant).join(key)).unwrap();
        packs
            .iter()
            .map(pack)
            .flat_map(|pack| pack[..pack.len() - 128].chunks_exact(16).map(<[u8]>::to_vec).collect::<Vec<_>>())
            .collect()
    };
    let (theirs, own) = (windows("acme"), windows("globex"));
    assert!(theirs.len() > CLUSTERS && theirs.is_disjoint(&own));
    // Within a tenant the same disk is known: so the figures above would have shown it.
    let again = backup(&site, "acme", "web", &path);
    assert_eq!(again["stats"]["new"], 0);
    for tenant in ["acme", "globex"] {
        assert!(self::content(&site, tenant, "vm@1").unwrap() == content);
    }
}

/// Where a KMS is comes from the configuration alone: a record may say what it likes.
#[test]
fn a_record_that_names_an_address_sends_nothing_there() {
    let mut site = Site::bare();
    Config::default().bao("bao", shared()).tenant("acme = \"bao\"").write(&mut site);
    site.reseal_of("acme", ["init", "--no-recovery"]).ok();
    let (path, own) = disk(&site, 1);
    backup(&site, "acme", "vm", &path);
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    listener.set_nonblocking(true).unwrap();
    let address = format!("http://{}", listener.local_addr().unwrap());
    let record = site.folder_of("acme").join("tenant.json");
    let text = fs::read(&record).unwrap();
    let with = |change: &dyn Fn(&mut Value)| {
        let mut changed: Value = serde_json::from_slice(&text).unwrap();
        change(&mut changed);
        fs::write(&record, serde_json::to_vec(&changed).unwrap()).unwrap();
    };
    // Fields of a configuration are none of a record: the tenant opens, at the KMS that it always had.
    with(&|record| {
        for field in ["address", "url", "kms_address", "namespace", "ca"] {
            record[field] = json!(address);
            record["kms"][field] = json!(address);
        }
        record["kms"]["auth"] = json!({ "token_file": "/etc/passwd" });
    });
    assert_eq!(content(&site, "acme", "vm@1").as_ref(), Some(&own));
    site.reseal_of("acme", ["tenant", "show"]).ok();
    // The name of a key is a name, not a way to somewhere.
    for key in [&*format!("{address}/v1/transit/keys/x"), "../../auth/token/lookup-self", "x?y", "x/y", "", "\n"] {
        with(&|record| record["kms"]["key"] = json!(key));
        for words in [&["list"][..], &["verify"], &["rekey", "--kek"], &["tenant", "erase", "acme", "--yes", "acme"]] {
            site.reseal_of("acme", words).fails(3, &["tenant.json", "no KMS key has such a name"]);
        }
    }
    for kind in [&*address, "VAULT", "kmip", "keyring", ""] {
        with(&|record| record["kms"]["kind"] = json!(kind));
        site.reseal_of("acme", ["list"]).fails(1, &["tenant acme", "nothing was asked there"]);
    }
    let heard = listener.accept().map(|(_, from)| from);
    assert!(heard.is_err(), "something was sent there: {heard:?}");
    fs::write(&record, &text).unwrap();
    verify(&site, "acme").ok();
}
