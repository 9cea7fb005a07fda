//! Damage to a kit at every place, and its bounds, at a cost that a test can pay a thousand times.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::fs;
use std::io::Read;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;

use age::armor::ArmoredReader;
use age::secrecy::ExposeSecret;
use age::x25519::Identity;
use tempfile::TempDir;

use super::document::{KEY_ROOM, TEXT_ROOM};
use super::*;
use crate::Passphrase;

const CHEAP: u8 = 1;

fn passphrase(text: &str) -> Passphrase {
    Passphrase::new(text.to_owned()).unwrap()
}

fn lock(text: &str) -> KitLock {
    KitLock::Passphrase(passphrase(text))
}

fn phrase(text: &str) -> KitKey {
    KitKey::Passphrase(passphrase(text))
}

fn recipient(identity: &Identity) -> Recipient {
    identity.to_public().to_string().parse().unwrap()
}

fn encode(kit: &KitContents) -> Secret {
    document::encode(kit, kit.master.as_ref().unwrap())
}

fn contents() -> KitContents {
    let key =
        |name: &str, byte| NamedKey { name: KeyName::parse(name).unwrap(), key: KeyBytes::copy_from(&[byte; 32]) };
    KitContents {
        made: "2026-11-24T06:31:47Z".into(),
        vault_id: "00112233445566778899aabbccddeeff".into(),
        repo: "/srv/vault \"with\" quotes".into(),
        tenant: "Größe & Co".into(),
        tenant_id: "ffeeddccbbaa99887766554433221100".into(),
        kms: "keyring".into(),
        master: Some(KeyBytes::copy_from(&[0xC3; 32])),
        keys: vec![key("acme-0a1b2c3d", 0xA5), key("acme-4e5f6071", 0x5A)],
    }
}

fn written(dir: &TempDir) -> PathBuf {
    let path = dir.path().join("under-passphrase.age");
    write_at_cost(&path, &contents(), &lock("open sesame"), CHEAP).unwrap();
    path
}

/// An age file with any content, as someone else might make it.
fn sealed(dir: &TempDir, content: &[u8], work_factor: u8) -> PathBuf {
    let path = dir.path().join("other.age");
    fs::write(&path, lock("x").seal(content, work_factor).unwrap()).unwrap();
    path
}

#[test]
fn what_is_read_is_what_was_written() {
    let dir = tempfile::tempdir().unwrap();
    let path = written(&dir);
    assert_eq!(read_kit(&path, &phrase("open sesame")).unwrap(), contents());
    assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o7777, 0o600);
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
}

#[test]
fn a_kit_is_printable_and_nothing_but_armor() {
    let dir = tempfile::tempdir().unwrap();
    let text = fs::read_to_string(written(&dir)).unwrap();
    assert!(text.starts_with("-----BEGIN AGE ENCRYPTED FILE-----\n"));
    assert!(text.ends_with("\n-----END AGE ENCRYPTED FILE-----\n"));
    assert!(text.lines().all(|line| line.len() <= 64 && line.bytes().all(|b| b.is_ascii_graphic() || b == b' ')));
}

#[test]
fn a_kit_typed_in_on_another_system_opens() {
    let dir = tempfile::tempdir().unwrap();
    let path = written(&dir);
    let text = fs::read_to_string(&path).unwrap();
    for typed in [text.replace('\n', "\r\n"), format!("{text}\n\n"), text.trim_end().to_owned()] {
        fs::write(&path, typed).unwrap();
        assert_eq!(read_kit(&path, &phrase("open sesame")).unwrap(), contents());
    }
}

#[test]
fn an_existing_file_is_never_overwritten() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("kit.age");
    fs::write(&path, b"precious").unwrap();
    let error = write_at_cost(&path, &contents(), &lock("x"), CHEAP).unwrap_err();
    assert!(matches!(error, KmsError::KitExists { .. }), "{error}");
    assert_eq!(fs::read(&path).unwrap(), b"precious");
}

#[test]
fn a_wrong_passphrase_is_said_to_be_that() {
    let dir = tempfile::tempdir().unwrap();
    let path = written(&dir);
    for wrong in ["open sesam", "open sesame ", "x"] {
        let error = read_kit(&path, &phrase(wrong)).unwrap_err();
        assert!(matches!(error, KmsError::KitWrongPassphrase { .. }), "{error}");
        assert!(!error.to_string().contains("sesam"), "{error}");
    }
}

#[test]
fn a_kit_cut_anywhere_is_reported() {
    let dir = tempfile::tempdir().unwrap();
    let path = written(&dir);
    let whole = fs::read(&path).unwrap();
    for len in 0..whole.len() - 1 {
        fs::write(&path, &whole[..len]).unwrap();
        let error = read_kit(&path, &phrase("open sesame")).unwrap_err();
        assert!(matches!(error, KmsError::KitCorrupt { .. } | KmsError::NotAKit { .. }), "{len}: {error}");
    }
}

#[test]
fn a_byte_flipped_anywhere_is_reported_or_changes_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let path = written(&dir);
    let whole = fs::read(&path).unwrap();
    for at in 0..whole.len() {
        let mut damaged = whole.clone();
        damaged[at] ^= 1 << (at % 8);
        fs::write(&path, &damaged).unwrap();
        match read_kit(&path, &phrase("open sesame")) {
            // Blanks at the end of a line mean nothing to age.
            Ok(read) => assert_eq!(read, contents(), "byte {at}"),
            Err(
                KmsError::KitCorrupt { .. }
                | KmsError::NotAKit { .. }
                | KmsError::KitWrongPassphrase { .. }
                | KmsError::KitTooCostly { .. }
                // What says that a passphrase opens it was hit.
                | KmsError::KitNeedsIdentity { .. },
            ) => {}
            Err(error) => panic!("byte {at}: {error}"),
        }
    }
}

#[test]
fn a_costly_kit_is_refused_before_it_is_paid_for() {
    let dir = tempfile::tempdir().unwrap();
    let path = written(&dir);
    // The cost stands in clear in the header, so a hostile file can claim any.
    let reader = ArmoredReader::new(fs::File::open(&path).unwrap());
    let binary: Vec<u8> = reader.bytes().map(Result::unwrap).collect();
    let line = binary.iter().position(|b| *b == b'\n').unwrap() + 1;
    let end = line + binary[line..].iter().position(|b| *b == b'\n').unwrap();
    assert!(binary[line..end].starts_with(b"-> scrypt ") && binary[line..end].ends_with(b" 1"));
    for (claimed, refused) in [("21", 21), ("63", 63), ("64", 64)] {
        fs::write(&path, [&binary[..end - 1], claimed.as_bytes(), &binary[end..]].concat()).unwrap();
        let error = read_kit(&path, &phrase("open sesame")).unwrap_err();
        assert!(matches!(error, KmsError::KitTooCostly { required, limit: 20, .. } if required == refused), "{error}");
    }
}

#[test]
fn other_files_are_told_from_damaged_kits() {
    let dir = tempfile::tempdir().unwrap();
    let missing = read_kit(&dir.path().join("none"), &phrase("x")).unwrap_err();
    assert!(matches!(missing, KmsError::KitMissing { .. }), "{missing}");
    let path = dir.path().join("file");
    for content in [&b""[..], b"hello", b"{\"format\":\"reseal-recovery-kit\"}"] {
        fs::write(&path, content).unwrap();
        assert!(matches!(read_kit(&path, &phrase("x")), Err(KmsError::NotAKit { .. })));
    }
    fs::write(&path, vec![b'-'; 1024 * 1024 + 1]).unwrap();
    assert!(matches!(read_kit(&path, &phrase("x")), Err(KmsError::TooLarge { .. })));
    let identity = Identity::generate();
    fs::write(&path, age::encrypt(&identity.to_public(), b"{}").unwrap()).unwrap();
    assert!(matches!(read_kit(&path, &phrase("x")), Err(KmsError::KitNeedsIdentity { .. })));
    let opened = read_kit(&path, &KitKey::Identities(vec![identity]));
    assert!(matches!(opened, Err(KmsError::KitCorrupt { .. })));
    let letter = sealed(&dir, b"{\"format\":\"letter\",\"version\":1}", CHEAP);
    assert!(matches!(read_kit(&letter, &phrase("x")), Err(KmsError::NotAKit { .. })));
}

#[test]
fn content_that_does_not_fit_the_format_is_refused_without_quoting_it() {
    let dir = tempfile::tempdir().unwrap();
    let good = String::from_utf8(encode(&contents()).to_vec()).unwrap();
    let read = |content: &str| read_kit(&sealed(&dir, content.as_bytes(), CHEAP), &phrase("x"));
    assert_eq!(read(&good).unwrap(), contents());
    let newer = read(&good.replace("\"version\": 2", "\"version\": 9, \"unheard\": 1")).unwrap_err();
    assert!(matches!(newer, KmsError::KitVersion { found: 9, known: 2, .. }), "{newer}");
    let master = good.lines().find(|line| line.contains("master")).unwrap();
    for bad in [
        // A master without its version, and the other way round.
        good.replace("\"version\": 2", "\"version\": 1"),
        good.replace("\"version\": 2", "\"version\": 0"),
        good.replace(master, ""),
        good.replace(master, "\"master\": null,"),
        good.replace(master, &master.repeat(2)),
        good.replace(master, &format!("\"master\": \"{}\",", "c3".repeat(31))),
        good.replace(master, "\"master\": 7,"),
        good.replace("a5a5a5", "A5A5A5"),
        good.replace("acme-4e5f6071", "acme-0a1b2c3d"),
        good.replace("acme-4e5f6071", "../../x"),
        good.replace("\"kms\"", "\"kind\""),
        good.replace("\"Größe & Co\"", "\"\""),
        good.replace("Größe", &"x".repeat(MAX_TEXT)),
        good[..good.len() / 2].to_owned(),
        String::new(),
    ] {
        let error = read(&bad).unwrap_err();
        let is_refused = matches!(error, KmsError::KitCorrupt { .. } | KmsError::KitVersion { found: 0, .. });
        assert!(is_refused, "{error}: {bad}");
        let said = format!("{error} {error:?}").to_lowercase();
        assert!(!said.contains("a5a5") && !said.contains("c3c3"), "{error}");
    }
}

#[test]
fn a_kit_that_could_not_be_read_is_not_written() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("kit.age");
    let twice = || contents().keys.into_iter().chain(contents().keys).collect();
    for bad in [
        KitContents { master: None, keys: Vec::new(), ..contents() },
        KitContents { master: None, ..contents() },
        KitContents { keys: twice(), ..contents() },
        KitContents { tenant: String::new(), ..contents() },
        KitContents { repo: "x".repeat(MAX_TEXT + 1), ..contents() },
    ] {
        assert!(matches!(write_at_cost(&path, &bad, &lock("x"), CHEAP), Err(KmsError::KitInvalid { .. })));
        assert!(!path.exists());
    }
}

#[test]
fn the_largest_kit_fits_its_limits() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("kit.age");
    let worst = || "\u{1}".repeat(MAX_TEXT);
    let names = (0..MAX_KEYS).map(|i| KeyName::parse(&format!("{i:05}{}", "x".repeat(123))).unwrap());
    let kit = KitContents {
        made: worst(),
        vault_id: worst(),
        repo: worst(),
        tenant: worst(),
        tenant_id: worst(),
        kms: worst(),
        master: Some(KeyBytes::zeroed()),
        keys: names.map(|name| NamedKey { name, key: KeyBytes::zeroed() }).collect(),
    };
    let encoded = encode(&kit);
    assert!(encoded.len() < TEXT_ROOM + MAX_KEYS * KEY_ROOM, "the buffer grew");
    write_at_cost(&path, &kit, &lock("x"), CHEAP).unwrap();
    assert_eq!(read_kit(&path, &phrase("x")).unwrap(), kit);
}

#[test]
fn debug_of_a_kit_shows_no_key() {
    let shown = format!("{:?}", contents());
    assert!(shown.contains("acme-0a1b2c3d"));
    assert!(!shown.contains("a5a5") && !shown.contains("165") && !shown.contains("195"), "{shown}");
    let keys = [phrase("open sesame"), KitKey::Identities(vec![Identity::generate()])];
    let shown = format!("{keys:?} {:?}", lock("open sesame"));
    assert!(!shown.contains("sesame") && !shown.contains("SECRET"), "{shown}");
}

#[test]
fn a_kit_without_keys_is_one() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("kit.age");
    let kit = KitContents { kms: "vault".into(), keys: Vec::new(), ..contents() };
    write_at_cost(&path, &kit, &lock("x"), CHEAP).unwrap();
    assert_eq!(read_kit(&path, &phrase("x")).unwrap(), kit);
}

#[test]
fn any_of_its_recipients_opens_a_kit_and_nobody_else() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("kit.age");
    let [one, two, stranger] = std::array::from_fn(|_| Identity::generate());
    let both = KitLock::recipients(vec![recipient(&one), recipient(&two)]).unwrap();
    write_kit(&path, &contents(), &both).unwrap();
    assert!(fs::read(&path).unwrap().starts_with(b"-----BEGIN AGE ENCRYPTED FILE-----\n"));
    assert!(!SealedKit::read(&path).unwrap().is_under_passphrase().unwrap());
    let open = |identities: &[&Identity]| {
        read_kit(&path, &KitKey::Identities(identities.iter().map(|&identity| identity.clone()).collect()))
    };
    for identities in [&[&one][..], &[&two], &[&stranger, &two]] {
        assert_eq!(open(identities).unwrap(), contents());
    }
    let error = open(&[&stranger]).unwrap_err();
    assert!(matches!(error, KmsError::KitOtherRecipients { .. }), "{error}");
    let error = read_kit(&path, &phrase("x")).unwrap_err();
    assert!(matches!(error, KmsError::KitNeedsIdentity { .. }), "{error}");
    let under_passphrase = written(&dir);
    let error = read_kit(&under_passphrase, &KitKey::Identities(vec![one.clone()])).unwrap_err();
    assert!(matches!(error, KmsError::KitNeedsPassphrase { .. }), "{error}");

    let whole = fs::read(&path).unwrap();
    for at in 0..whole.len() {
        let mut damaged = whole.clone();
        damaged[at] ^= 1 << (at % 8);
        fs::write(&path, &damaged).unwrap();
        match open(&[&one]) {
            // Blanks at the end of a line mean nothing to age.
            Ok(read) => assert_eq!(read, contents(), "byte {at}"),
            Err(KmsError::KitCorrupt { .. } | KmsError::NotAKit { .. } | KmsError::KitOtherRecipients { .. }) => {}
            Err(error) => panic!("byte {at}: {error}"),
        }
    }
}

/// Recipients that are none, or that anybody could open, never reach age.
#[test]
fn bad_recipients_are_refused_by_name() {
    let dir = tempfile::tempdir().unwrap();
    let own = Identity::generate();
    let good = recipient(&own);
    let weak = |point: [u8; 32]| bech32::encode::<bech32::Bech32>(bech32::Hrp::parse("age").unwrap(), &point).unwrap();
    let mut one = [0; 32];
    one[0] = 1;
    let order_eight = "e0eb7a7c3b41b8ae1656e3faf19fc46ada098deb9c32b1fd866205165f49b800";
    let mut eight = [0; 32];
    hex::decode_to_slice(order_eight, &mut eight).unwrap();
    let typed_wrong = {
        let text = Identity::generate().to_public().to_string();
        let last = if text.ends_with('q') { 'p' } else { 'q' };
        format!("{}{last}", &text[..text.len() - 1])
    };
    for bad in
        [weak([0; 32]), weak(one), weak(eight), typed_wrong, "age1".into(), "ssh-ed25519 AAAA".into(), String::new()]
    {
        let error = bad.parse::<Recipient>().unwrap_err();
        assert!(matches!(error, KmsError::Recipient { .. }), "{error}");
        assert!(error.to_string().contains(bad.as_str()), "{error}");
    }
    // A secret that was given by mistake is not shown.
    let identity = Identity::generate().to_string();
    let secret = identity.expose_secret();
    for text in [secret.to_owned(), secret.to_lowercase(), format!(" {secret}")] {
        let error = text.parse::<Recipient>().unwrap_err();
        let said = format!("{error} {error:?}").to_lowercase();
        assert!(!said.contains(&secret[20..40].to_lowercase()), "{said}");
    }
    assert!(matches!(KitLock::recipients(Vec::new()), Err(KmsError::Recipients { count: 0, .. })));
    assert!(matches!(KitLock::recipients(vec![good.clone(); 65]), Err(KmsError::Recipients { count: 65, .. })));

    let list = dir.path().join("recipients");
    let good_text = own.to_public().to_string();
    fs::write(&list, format!("# safe\n\n{good_text}\r\n  {good_text}  \n")).unwrap();
    assert_eq!(read_recipients(&list).unwrap(), [good.clone(), good]);
    fs::write(&list, "# none\n").unwrap();
    assert!(read_recipients(&list).unwrap_err().to_string().contains("no recipient"));
    fs::write(&list, "#\nage1x\n").unwrap();
    let error = read_recipients(&list).unwrap_err().to_string();
    assert!(error.contains("recipients: line 2") && error.contains("age1x"), "{error}");
}

#[test]
fn identities_are_private_and_never_shown() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("identity.txt");
    let kit = dir.path().join("kit.age");
    let identity = Identity::generate();
    write_kit(&kit, &contents(), &KitLock::recipients(vec![recipient(&identity)]).unwrap()).unwrap();
    let never = |_: &Path| -> std::io::Result<Passphrase> { panic!("no passphrase is needed") };
    let write = |content: &[u8], mode| {
        fs::write(&path, content).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
    };
    let secret = identity.to_string();
    let text = format!("# created: today\n# public key: {}\n{}\n", identity.to_public(), secret.expose_secret());
    write(text.as_bytes(), 0o600);
    assert_eq!(read_kit(&kit, &read_identities(&path, never).unwrap()).unwrap(), contents());
    write(text.as_bytes(), 0o640);
    assert!(matches!(read_identities(&path, never), Err(KmsError::Exposed { .. })));
    let cut = &text[..text.len() - 4];
    for bad in
        [cut.as_bytes(), b"", b"# nothing", b"AGE-PLUGIN-X-1", &[0xFF], secret.expose_secret().repeat(2).as_bytes()]
    {
        write(bad, 0o600);
        let error = read_identities(&path, never).unwrap_err();
        assert!(matches!(error, KmsError::AgeFile { .. }), "{error}");
        assert!(!format!("{error} {error:?}").contains(&secret.expose_secret()[20..40]), "{error}");
    }
    assert!(matches!(read_identities(&dir.path().join("none"), never), Err(KmsError::AgeFile { .. })));
    write(format!("{}\n", secret.expose_secret()).repeat(65).as_bytes(), 0o600);
    assert!(read_identities(&path, never).unwrap_err().to_string().contains("more than 64"));

    // Under a passphrase, as `age -p` makes it.
    write(&lock("of the identity").seal(text.as_bytes(), CHEAP).unwrap(), 0o600);
    let opened = read_identities(&path, |_| Ok(passphrase("of the identity"))).unwrap();
    assert_eq!(read_kit(&kit, &opened).unwrap(), contents());
    let error = read_identities(&path, |_| Ok(passphrase("another"))).unwrap_err();
    assert!(error.to_string().contains("wrong passphrase"), "{error}");
    let error = read_identities(&path, |_| Err(std::io::ErrorKind::NotConnected.into())).unwrap_err();
    assert!(error.to_string().contains("passphrase"), "{error}");
}

/// The sheet of a kit, and what of it is to be copied.
fn sheet(path: &Path) -> (String, Vec<String>) {
    let sheet = SealedKit::read(path).unwrap().sheet("2026-11-24T06:31:47Z").unwrap();
    let body = copied(&sheet);
    (sheet, body)
}

fn copied(sheet: &str) -> Vec<String> {
    sheet.lines().skip_while(|line| !line.starts_with("-----BEGIN")).map(str::to_owned).collect()
}

#[test]
fn a_sheet_fits_on_two_pages_and_tells_how_to_use_it() {
    let dir = tempfile::tempdir().unwrap();
    let kits = [written(&dir), dir.path().join("recipients.age")];
    let people = (0..5).map(|_| recipient(&Identity::generate())).collect();
    write_kit(&kits[1], &contents(), &KitLock::recipients(people).unwrap()).unwrap();
    for (kit, how) in kits.iter().zip(["the passphrase", "--recovery-identity"]) {
        let (sheet, _) = sheet(kit);
        assert!(sheet.lines().count() <= 2 * 60, "{}: {sheet}", sheet.lines().count());
        for line in sheet.lines() {
            assert!(line.len() <= 80 && line.bytes().all(|b| b.is_ascii_graphic() || b == b' '), "{line}");
        }
        for said in [how, "2026-11-24T06:31:47Z", kit.file_name().unwrap().to_str().unwrap(), "reseal key import"] {
            assert!(sheet.contains(said), "{said}: {sheet}");
        }
    }
}

#[test]
fn a_sheet_that_was_typed_in_again_opens() {
    let dir = tempfile::tempdir().unwrap();
    let (sheet, body) = sheet(&written(&dir));
    let path = dir.path().join("typed");
    let lines = body.join("\n");
    let narrow: String = lines.lines().map(|line| line.replace("  ", "\n      ") + "\n\n").collect();
    let squeezed: String = lines.lines().map(|line| line.replace(' ', "") + "\n").collect();
    let spread = |line: &str| line.chars().map(|c| format!("{c} ")).collect::<String>() + "\r\n";
    let mut shuffled = body.clone();
    let last = shuffled.len() - 1;
    shuffled[1..last].reverse();
    let checks_in_capitals: String = body
        .iter()
        .map(|line| match line.rsplit_once("  ") {
            Some((text, check)) => format!("{text}\t{}\n", check.to_uppercase()),
            None => format!("{}\n", line.to_lowercase()),
        })
        .collect();
    for typed in [
        sheet.clone(),
        lines.clone(),
        narrow,
        squeezed,
        body.iter().map(|line| if line.starts_with('-') { format!("{line}\n") } else { spread(line) }).collect(),
        shuffled.join("\n"),
        checks_in_capitals,
        lines.replace("-----END RESEAL KIT-----", ""),
        format!("notes\nof a helper: thanks\n{lines}\nmore: notes\n"),
    ] {
        fs::write(&path, &typed).unwrap();
        assert_eq!(read_kit(&path, &phrase("open sesame")).unwrap(), contents(), "{typed}");
        // A copy can be printed again.
        assert!(SealedKit::read(&path).unwrap().sheet("x").unwrap().contains(&lines));
    }
}

/// The error of a sheet that was copied with a mistake.
fn miscopied(dir: &TempDir, lines: &[String]) -> String {
    let path = dir.path().join("typed");
    fs::write(&path, lines.join("\n")).unwrap();
    let error = SealedKit::read(&path).unwrap_err();
    assert!(matches!(error, KmsError::SheetMiscopied { .. }), "{error}");
    error.to_string()
}

#[test]
fn a_mistyped_line_is_named() {
    let dir = tempfile::tempdir().unwrap();
    // Always the same bytes: by chance, a check could be right for a wrong line too.
    let age: Vec<u8> = (0..1100u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
    let body = copied(&sheet::encode(&age, "kit.age", "today", true));
    let count = body.len() - 2;
    for number in 1..=count {
        let line = &body[number];
        let text_from = line.find(':').unwrap() + 2;
        for at in (text_from..line.len()).filter(|&at| line.as_bytes()[at] != b' ') {
            let other = if &line[at..=at] == "7" { "1" } else { "7" };
            let mut typed = body.clone();
            typed[number].replace_range(at..=at, other);
            let said = miscopied(&dir, &typed);
            assert!(said.contains(&format!("line {number} does not match its check;")), "{at}: {said}");
            typed[number] = line.clone();
            typed[number].remove(at);
            assert!(miscopied(&dir, &typed).contains(&format!("line {number} does not match its check;")));
        }
        let mut typed = body.clone();
        typed.remove(number);
        assert!(miscopied(&dir, &typed).contains(&format!("line {number} is missing;")));
        typed = body.clone();
        typed.insert(number, line.clone());
        assert!(miscopied(&dir, &typed).contains(&format!("line {number} is there twice;")));
        typed = body.clone();
        typed[number] = line.replacen(&number.to_string(), "x", 1);
        let said = miscopied(&dir, &typed);
        assert!(said.contains(&format!("line {number} is missing, a line has no number")), "{said}");
    }
    let mut typed = body.clone();
    let (first, second) = (body[1].replace(" 1:", " 2:"), body[2].replace(" 2:", " 1:"));
    (typed[1], typed[2]) = (first, second);
    assert!(miscopied(&dir, &typed).contains("line 1 does not match its check, line 2 does not match its check;"));
    typed = body.clone();
    typed.insert(count + 1, format!("{}: abcd 123456", count + 1));
    assert!(miscopied(&dir, &typed).contains(&format!("there is a line {}, of {count};", count + 1)));
}

#[test]
fn hostile_sheets_are_refused_in_little_time() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("sheet");
    let read = |text: &str| {
        fs::write(&path, text).unwrap();
        SealedKit::read(&path).unwrap_err().to_string()
    };
    for count in ["", "0", "-1", "x", "18446744073709551615", "99999999999999999999999", "1000000"] {
        let said = read(&format!("-----BEGIN RESEAL KIT, {count} LINES-----\n1: abcd 123456\n"));
        assert!(said.contains("BEGIN line") || said.contains("line 1"), "{count}: {said}");
    }
    assert!(read(&format!("BEGIN RESEAL KIT 1000000 LINES\n{}", "1:\n".repeat(300_000))).len() < 2000);
    assert!(read(&format!("BEGIN RESEAL KIT 300000 LINES\n{}", ":\n".repeat(300_000))).len() < 2000);
    for text in ["BEGIN RESEAL KIT 1 LINES\n1:", "BEGIN RESEAL KIT 1 LINES\n1:é", "BEGIN RESEAL KIT 1 LINES\n1: ääää"]
    {
        assert!(read(text).contains("line 1 does not match"), "{text}");
    }
    // Right checks on what is no age file.
    let wrong = |text: &str| {
        let check = &hex::encode(<sha2::Sha256 as sha2::Digest>::digest(format!("1:{text}")))[..6];
        read(&format!("BEGIN RESEAL KIT 1 LINES\n1: {text} {check}\nEND RESEAL KIT"))
    };
    assert!(wrong("abc!").contains("no base64"));
    fs::write(&path, "BEGIN RESEAL KIT").unwrap();
    assert!(SealedKit::read(&path).unwrap_err().to_string().contains("BEGIN line"));
}
