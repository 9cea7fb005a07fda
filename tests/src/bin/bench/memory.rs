//! reseal's memory on a small disk and on one so large that anything which grows with the disk's length would show.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use crate::contender::{Contender, DISK, Mount, renewed};
use crate::host::Disks;
use crate::plan::Plan;
use crate::reseal::Reseal;
use crate::samples::{Memory, Samples};
use crate::{Result, reads};

const GIB: u64 = 1 << 30;
const PIECE: u64 = 1 << 20;
/// The data on each of these disks, in pieces.
const PIECES: u64 = 1024;
/// ext4's largest file is a block short of 16 TiB.
const LARGE: u64 = (16 << 40) - (1 << 16);
/// Random reads over the whole length, holes included: each touches another part of the index.
const SCATTERED_READS: u64 = 20_000;

pub(crate) fn take(plan: &Plan, disks: &Disks, samples: &mut Samples) -> Result<()> {
    if !samples.describes("reseal") {
        return Ok(());
    }
    for (disk, length) in [("1 GiB", GIB), ("16 TiB, sparse, 1 GiB of data all over it", LARGE)] {
        eprintln!("bench: memory of reseal for a disk of {disk}");
        match case(plan, disks, disk, length) {
            Ok(memory) => samples.memory.push(memory),
            Err(error) => eprintln!("bench: memory for a disk of {disk} not measured: {error}"),
        }
    }
    Ok(())
}

fn case(plan: &Plan, disks: &Disks, name: &str, length: u64) -> Result<Memory> {
    let source = plan.work.join("source");
    renewed(&source)?;
    let stride = length / PIECES / PIECE * PIECE;
    scatter(&disks.newest(), &source.join(DISK), length, stride)?;
    let mut reseal = Reseal::at(plan, "reseal-memory");
    reseal.renew()?;
    let mut backup = || -> Result<f64> { Ok(reseal.backup("", &source)?.ok_or("reseal made no backup")?.peak_mib) };
    let (backup_mib, second_backup_mib) = (backup()?, backup()?);
    let mount = reseal.mount(disks)?;
    let mount_mib = read_all_over(&mount, &disks.newest(), length, stride)?;
    drop(mount);
    std::fs::remove_dir_all(&source)?;
    Ok(Memory { disk: name.to_owned(), backup_mib, second_backup_mib, mount_mib })
}

/// The first GiB of the test disk, cut into pieces that lie a stride apart.
fn scatter(from: &Path, to: &Path, length: u64, stride: u64) -> Result<()> {
    let (from, to) = (File::open(from)?, File::create(to)?);
    to.set_len(length).map_err(|error| format!("this file system has no files of {length} bytes: {error}"))?;
    let mut piece = vec![0; usize::try_from(PIECE)?];
    for index in 0..PIECES {
        from.read_exact_at(&mut piece, index * PIECE)?;
        to.write_all_at(&piece, index * stride)?;
    }
    Ok(())
}

fn read_all_over(mount: &Mount, written: &Path, length: u64, stride: u64) -> Result<f64> {
    reads::sequential(&mount.file)?;
    let (file, written) = (File::open(&mount.file)?, File::open(written)?);
    let mut piece = vec![0; usize::try_from(PIECE)?];
    let mut expected = piece.clone();
    for index in 0..PIECES {
        file.read_exact_at(&mut piece, index * stride)?;
        written.read_exact_at(&mut expected, index * PIECE)?;
        if piece != expected {
            return Err(format!("piece {index} of the disk reads otherwise than it was written").into());
        }
    }
    // A multiplicative generator: the same places on every machine.
    let mut state: u64 = 1;
    for _ in 0..SCATTERED_READS {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        file.read_exact_at(&mut piece[..4096], (state >> 11) % (length / 4096) * 4096)?;
    }
    mount.peak_mib()
}
