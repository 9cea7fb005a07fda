//! Reading from another site, in this process.

use std::path::Path;

use crossbeam_channel::bounded;
use reseal_format::names::{DiskName, VmName};
use reseal_nbd::{Export, NbdError, Read, Request};
use reseal_site::{Enrolment, SiteReader};
use reseal_vault::VaultError;
use zeroize::Zeroizing;

/// Bytes of a request.
const UNIT: u64 = 256 << 10;

/// A reader with an enrolment file.
pub fn reader(file: &Path) -> SiteReader {
    SiteReader::new(Enrolment::read(file).unwrap())
}

/// Opens the disk `disk-0` of a point.
pub fn open(reader: &SiteReader, vm: &str, number: u32) -> Result<Export, VaultError> {
    open_disk(reader, vm, number, "disk-0")
}

/// Opens a disk of a point.
pub fn open_disk(reader: &SiteReader, vm: &str, number: u32, disk: &str) -> Result<Export, VaultError> {
    reader.disk(&VmName::new(vm).unwrap(), number, &DiskName::new(disk).unwrap())
}

/// The whole disk, over as many connections as it likes. `each` is told how many bytes have come.
pub fn read_whole(export: &Export, mut each: impl FnMut(usize)) -> Result<Vec<u8>, NbdError> {
    let length = export.length();
    let (request, requests) = bounded(16);
    let (answer, answers) = bounded::<Result<Read<()>, NbdError>>(16);
    std::thread::scope(|scope| {
        for _ in 0..export.connections() {
            let (requests, answer) = (requests.clone(), answer.clone());
            scope.spawn(move || export.pump(&requests, &answer));
        }
        drop((requests, answer));
        scope.spawn(move || {
            let mut offset = 0;
            while offset < length {
                let now = (length - offset).min(UNIT);
                let buffer = Zeroizing::new(vec![0xEE; usize::try_from(now).unwrap()]);
                if request.send(Request::Read(Read { offset, buffer, tag: () })).is_err() {
                    return;
                }
                offset += now;
            }
        });
        let mut whole = vec![0xDD; usize::try_from(length).unwrap()];
        let mut come = 0;
        let mut failure = None;
        for read in answers {
            match read {
                Ok(read) => {
                    let at = usize::try_from(read.offset).unwrap();
                    whole[at..at + read.buffer.len()].copy_from_slice(&read.buffer);
                    come += read.buffer.len();
                    each(come);
                }
                Err(e) => {
                    failure.get_or_insert(e);
                    export.stop();
                }
            }
        }
        match failure {
            None => {
                assert_eq!(come, whole.len());
                Ok(whole)
            }
            Some(e) => Err(e),
        }
    })
}
