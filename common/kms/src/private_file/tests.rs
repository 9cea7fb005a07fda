#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::os::unix::fs::{PermissionsExt, symlink};
use std::sync::mpsc;

use super::*;

fn mode(path: &Path) -> u32 {
    fs::metadata(path).unwrap().permissions().mode() & 0o7777
}

fn names(folder: &Path) -> Vec<String> {
    let mut names: Vec<String> =
        fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

#[test]
fn a_new_file_is_private_and_never_replaces_another() {
    let dir = tempfile::tempdir().unwrap();
    let (path, staged) = (dir.path().join("f"), dir.path().join("f.new"));
    assert!(write_new(&path, &staged, b"one").unwrap());
    assert!(!write_new(&path, &staged, b"two").unwrap());
    assert_eq!(fs::read(&path).unwrap(), b"one");
    assert_eq!(mode(&path), 0o600);
    assert_eq!(names(dir.path()), ["f"]);
}

#[test]
fn without_the_rename_call_a_hard_link_does_the_same() {
    let dir = tempfile::tempdir().unwrap();
    let (path, staged) = (dir.path().join("f"), dir.path().join("f.new"));
    fs::write(&staged, b"one").unwrap();
    assert!(link_new(&staged, &path).unwrap());
    assert_eq!(names(dir.path()), ["f"]);
    fs::write(&staged, b"two").unwrap();
    assert!(!link_new(&staged, &path).unwrap());
    assert_eq!(fs::read(&path).unwrap(), b"one");
}

#[test]
fn a_dangling_link_is_not_written_through() {
    let dir = tempfile::tempdir().unwrap();
    let (path, target) = (dir.path().join("f"), dir.path().join("elsewhere"));
    symlink(&target, &path).unwrap();
    assert!(!write_new(&path, &dir.path().join("f.new"), b"one").unwrap());
    assert!(!target.exists());
}

#[test]
fn replacing_leaves_no_staged_file_and_keeps_the_mode_private() {
    let dir = tempfile::tempdir().unwrap();
    let (path, staged) = (dir.path().join("f"), dir.path().join("f.new"));
    fs::write(&path, b"old").unwrap();
    replace(&path, &staged, b"new").unwrap();
    assert_eq!(fs::read(&path).unwrap(), b"new");
    assert_eq!(mode(&path), 0o600);
    assert_eq!(names(dir.path()), ["f"]);
}

#[test]
fn a_failed_replacement_leaves_the_old_file_and_no_staged_one() {
    let dir = tempfile::tempdir().unwrap();
    let (path, staged) = (dir.path().join("f"), dir.path().join("f.new"));
    // A folder with something in it can't be replaced by a file.
    fs::create_dir_all(path.join("inside")).unwrap();
    assert!(matches!(replace(&path, &staged, b"new"), Err(KmsError::Io { .. })));
    assert_eq!(names(dir.path()), ["f"]);
}

#[test]
fn reading_is_bounded_and_tells_missing_from_empty() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("f");
    assert!(read(&path, 4).unwrap().is_none());
    fs::write(&path, b"").unwrap();
    assert!(read(&path, 4).unwrap().unwrap().is_empty());
    fs::write(&path, b"1234").unwrap();
    assert_eq!(**read(&path, 4).unwrap().unwrap(), *b"1234");
    fs::write(&path, b"12345").unwrap();
    assert!(matches!(read(&path, 4), Err(KmsError::TooLarge { .. })));
}

#[test]
fn folders_and_pipes_are_refused_without_waiting() {
    let dir = tempfile::tempdir().unwrap();
    assert!(matches!(read(dir.path(), 4), Err(KmsError::NotAFile { .. })));
    let pipe = dir.path().join("pipe");
    rustix::fs::mkfifoat(CWD, &pipe, rustix::fs::Mode::from(0o600)).unwrap();
    assert!(matches!(read_private(&pipe, 4), Err(KmsError::NotAFile { .. })));
}

#[test]
fn parents_are_made_private_and_existing_ones_kept() {
    let dir = tempfile::tempdir().unwrap();
    let there = dir.path().join("there");
    fs::create_dir(&there).unwrap();
    fs::set_permissions(&there, fs::Permissions::from_mode(0o755)).unwrap();
    make_parents(&there.join("a/b/f")).unwrap();
    make_parents(&there.join("a/b/f")).unwrap();
    assert_eq!(mode(&there), 0o755);
    assert_eq!(mode(&there.join("a")), 0o700);
    assert_eq!(mode(&there.join("a/b")), 0o700);
    assert!(!there.join("a/b/f").exists());
}

#[test]
fn a_lock_excludes_and_patience_ends() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("l");
    let held = Lock::acquire(&path, Duration::ZERO).unwrap();
    let started = Instant::now();
    assert!(matches!(Lock::acquire(&path, Duration::from_millis(50)), Err(KmsError::Busy { .. })));
    assert!(started.elapsed() >= Duration::from_millis(50));
    drop(held);
    assert!(Lock::acquire(&path, Duration::ZERO).is_ok());
    assert_eq!(mode(&path), 0o600);
}

#[test]
fn whoever_waits_for_a_lock_gets_it_when_it_is_free() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("l");
    let held = Lock::acquire(&path, Duration::ZERO).unwrap();
    let (sender, receiver) = mpsc::channel();
    thread::scope(|scope| {
        scope.spawn(|| sender.send(Lock::acquire(&path, LOCK_PATIENCE).is_ok()).unwrap());
        assert!(receiver.recv_timeout(Duration::from_millis(100)).is_err(), "the lock excluded nobody");
        drop(held);
        assert!(receiver.recv_timeout(Duration::from_secs(10)).unwrap());
    });
}
