use std::fs;
use std::os::unix::fs::PermissionsExt;

use serde_json::json;

use super::*;

fn secret(folder: &Path) -> Arc<Secret> {
    let path = folder.join("secret");
    fs::write(&path, "correct horse\n").unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
    read_secret(&path).unwrap()
}

#[test]
fn what_qemu_is_told_opens_the_disk_and_names_its_secret() {
    let folder = tempfile::tempdir().unwrap();
    let secret = secret(folder.path());
    let spec = |format, secret| TargetSpec::new(Path::new("/a,b"), format, secret).unwrap();
    let file = |driver: &str| json!({ "driver": driver, "filename": "/a,b", "discard": "unmap" });
    let told = |format, secret, shown| image::blockdev(&spec(format, secret), "/a,b", shown, "n", "s");
    assert_eq!(
        told(Format::Raw, None, None),
        json!({ "driver": "raw", "file": file("file"), "discard": "unmap", "node-name": "n" })
    );
    assert_eq!(
        told(Format::Qcow2, Some(secret.clone()), None),
        json!({
            "driver": "qcow2", "encrypt": { "format": "luks", "key-secret": "s" }, "file": file("file"),
            "discard": "unmap", "node-name": "n"
        })
    );
    // A device may be longer than the disk.
    assert_eq!(
        told(Format::Raw, None, Some(1000)),
        json!({ "driver": "raw", "file": file("host_device"), "size": 1024, "discard": "unmap", "node-name": "n" })
    );
    let luks = json!({ "driver": "luks", "key-secret": "s", "file": file("host_device") });
    assert_eq!(
        told(Format::Raw, Some(secret.clone()), Some(1024)),
        json!({ "driver": "raw", "file": luks, "size": 1024, "discard": "unmap", "node-name": "n" })
    );
    let options = image::options(&spec(Format::Qcow2, Some(secret)), "/a,b", false, "s");
    assert_eq!(
        options,
        "driver=qcow2,encrypt.format=luks,encrypt.key-secret=s,discard=unmap,file.driver=file,file.filename=/a,,b"
    );
}

#[test]
fn what_makes_no_sense_is_refused_before_anything_is_made() {
    let folder = tempfile::tempdir().unwrap();
    let secret = secret(folder.path());
    let path = folder.path().join("t");
    let refused = TargetSpec::new(&path, Format::Vmdk, Some(secret)).err().unwrap();
    assert!(matches!(refused, TargetError::ClearOnly) && refused.is_usage());
    let vmdk = TargetSpec::new(&path, Format::Vmdk, None).unwrap();
    assert!(matches!(vmdk.demand_rewritable(), Err(TargetError::WrittenOnce)));
    fs::write(&path, "old").unwrap();
    for format in [Format::Raw, Format::Qcow2, Format::Vmdk] {
        let spec = TargetSpec::new(&path, format, None).unwrap();
        assert!(matches!(spec.create(512, false), Err(TargetError::Exists { .. })), "{format}");
    }
    assert_eq!(fs::read_to_string(&path).unwrap(), "old");
    for bad in ["", "RAW", "luks", "vhd"] {
        assert!(bad.parse::<Format>().is_err(), "{bad}");
    }
}

#[test]
fn a_file_goes_unless_it_was_finished_and_is_private() {
    let folder = tempfile::tempdir().unwrap();
    for format in [Format::Raw, Format::Qcow2] {
        let path = folder.path().join(format!("a,b:c.{format}"));
        let spec = TargetSpec::new(&path, format, None).unwrap();
        assert!(spec.is_clear());
        drop(spec.create(1000, false).unwrap());
        assert!(!path.exists());
        let created = spec.create(1000, false).unwrap();
        assert_eq!(created.blockdev("n", "s")["file"]["filename"], path.to_str().unwrap());
        created.finish().unwrap();
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        // What was there before stays, though not its content.
        drop(spec.create(1000, true).unwrap());
        assert!(path.exists());
    }
    assert_eq!(fs::metadata(folder.path().join("a,b:c.raw")).unwrap().len(), 1024);
}

#[test]
fn a_folder_that_is_not_there_is_named() {
    let spec = TargetSpec::new(Path::new("/nowhere/at/all.qcow2"), Format::Qcow2, None).unwrap();
    let failed = spec.create(512, false).err().unwrap();
    assert!(failed.to_string().starts_with("can't make /nowhere/at/all.qcow2: No such file"), "{failed}");
}
