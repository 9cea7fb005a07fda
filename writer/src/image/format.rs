//! Which container a file is, by its name and its content together.

use std::fmt;
use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::os::unix::fs::FileTypeExt;
use std::path::Path;
use std::str::FromStr;

use super::ImageError;

/// Bytes of the start that tell formats apart: the VDI's signature ends at 68.
const START: usize = 512;
/// The footer of a VHD.
const FOOTER: usize = 512;

/// A container of a disk, or none.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ImageFormat {
    Qcow2,
    Vmdk,
    Vhdx,
    Vdi,
    /// VHD, which QEMU calls by the program that it comes from, Virtual PC.
    Vpc,
    /// A LUKS volume that the hypervisor opens, not the guest.
    Luks,
    Raw,
}

impl ImageFormat {
    const ALL: [ImageFormat; 7] = [
        ImageFormat::Qcow2,
        ImageFormat::Vmdk,
        ImageFormat::Vhdx,
        ImageFormat::Vdi,
        ImageFormat::Vpc,
        ImageFormat::Luks,
        ImageFormat::Raw,
    ];

    /// QEMU's name of it.
    pub fn driver(self) -> &'static str {
        match self {
            ImageFormat::Qcow2 => "qcow2",
            ImageFormat::Vmdk => "vmdk",
            ImageFormat::Vhdx => "vhdx",
            ImageFormat::Vdi => "vdi",
            ImageFormat::Vpc => "vpc",
            ImageFormat::Luks => "luks",
            ImageFormat::Raw => "raw",
        }
    }

    /// Its name for people.
    pub fn title(self) -> &'static str {
        match self {
            ImageFormat::Qcow2 => "qcow2",
            ImageFormat::Vmdk => "VMDK",
            ImageFormat::Vhdx => "VHDX",
            ImageFormat::Vdi => "VDI",
            ImageFormat::Vpc => "VHD",
            ImageFormat::Luks => "LUKS",
            ImageFormat::Raw => "raw",
        }
    }

    /// The format that a file's name promises.
    fn of_name(path: &Path) -> Option<ImageFormat> {
        let name = path.file_name()?.to_str()?.to_ascii_lowercase();
        // VMware's extents of raw bytes have a VMDK's name, and what is in them the guest has written.
        if name.strip_suffix(".vmdk").is_some_and(is_flat_extent) {
            return None;
        }
        match name.rsplit_once('.')?.1 {
            "qcow2" => Some(ImageFormat::Qcow2),
            "vmdk" => Some(ImageFormat::Vmdk),
            "vhdx" => Some(ImageFormat::Vhdx),
            "vdi" => Some(ImageFormat::Vdi),
            "vhd" | "vpc" => Some(ImageFormat::Vpc),
            "luks" => Some(ImageFormat::Luks),
            _ => None,
        }
    }

    /// Whether content is of this format: its first bytes, and its last sector.
    fn is_content(self, start: &[u8], footer: &[u8]) -> bool {
        match self {
            ImageFormat::Qcow2 => start.starts_with(b"QFI\xfb"),
            ImageFormat::Vmdk => {
                [&b"KDMV"[..], b"COWD", b"# Disk DescriptorFile"].iter().any(|magic| start.starts_with(magic))
            }
            ImageFormat::Vhdx => start.starts_with(b"vhdxfile"),
            ImageFormat::Vdi => start.get(64..).is_some_and(|rest| rest.starts_with(b"\x7f\x10\xda\xbe")),
            // A VHD of fixed size is the raw disk with a footer.
            ImageFormat::Vpc => start.starts_with(b"conectix") || footer.starts_with(b"conectix"),
            ImageFormat::Luks => start.starts_with(b"LUKS\xba\xbe"),
            ImageFormat::Raw => false,
        }
    }

    /// What content looks like. LUKS is left out: a guest that encrypts its disk itself leaves exactly that, and is
    /// backed up as it is.
    fn of_content(start: &[u8], footer: &[u8]) -> Option<ImageFormat> {
        ImageFormat::ALL.into_iter().find(|format| *format != ImageFormat::Luks && format.is_content(start, footer))
    }

    /// The container that is meant by a file's name and its content; `None` if it holds a disk's raw bytes. Where the
    /// two do not agree, it must be asked for.
    pub fn detect(path: &Path, start: &[u8], footer: &[u8]) -> Result<Option<ImageFormat>, ImageError> {
        let shown = || path.display().to_string();
        match (ImageFormat::of_name(path), ImageFormat::of_content(start, footer)) {
            (Some(named), _) if named.is_content(start, footer) => Ok(Some(named)),
            (_, Some(format)) => Err(ImageError::Unnamed { path: shown(), format }),
            (Some(format), None) => Err(ImageError::Misnamed { path: shown(), format }),
            (None, None) => Ok(None),
        }
    }
}

/// Whether a VMDK's name without its ending is that of an extent of raw bytes: `disk-flat`, or `disk-f001` of several.
fn is_flat_extent(stem: &str) -> bool {
    let part = stem.rsplit_once('-').map_or("", |(_, part)| part);
    let numbered = |digits: &str| !digits.is_empty() && digits.bytes().all(|digit| digit.is_ascii_digit());
    part == "flat" || part.strip_prefix('f').is_some_and(numbered)
}

impl fmt::Display for ImageFormat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            ImageFormat::Vpc => "vhd",
            other => other.driver(),
        })
    }
}

impl FromStr for ImageFormat {
    type Err = ImageError;

    fn from_str(text: &str) -> Result<ImageFormat, ImageError> {
        let named = |format: &ImageFormat| format.driver() == text || format.to_string() == text;
        let found = ImageFormat::ALL.into_iter().find(named);
        found.ok_or_else(|| ImageError::UnknownFormat(text.chars().take(32).collect()))
    }
}

/// The container that a disk is to be read as: the one that the user names, otherwise what name and content agree on.
/// `None` if the file's bytes are the disk's.
pub fn decide(path: &Path, explicit: Option<ImageFormat>) -> Result<Option<ImageFormat>, ImageError> {
    match explicit {
        Some(ImageFormat::Raw) => return Ok(None),
        Some(format) => return Ok(Some(format)),
        None => {}
    }
    // What is no file has no format, and may never end when it is read; whoever opens it says what it is.
    if std::fs::metadata(path).is_ok_and(|data| !data.is_file() && !data.file_type().is_block_device()) {
        return Ok(None);
    }
    let (start, footer) = content(path)?;
    ImageFormat::detect(path, &start, &footer)
}

/// An error unless a file's content is of the format that it is to be read as. Descriptors of VMDKs are text of many
/// forms, of which QEMU is the judge.
pub(super) fn demand(path: &Path, format: ImageFormat) -> Result<(), ImageError> {
    let (start, footer) = content(path)?;
    match format {
        ImageFormat::Raw | ImageFormat::Vmdk => Ok(()),
        _ if format.is_content(&start, &footer) => Ok(()),
        _ => Err(ImageError::NotThat { path: path.display().to_string(), format }),
    }
}

fn content(path: &Path) -> Result<(Vec<u8>, Vec<u8>), ImageError> {
    let failed = |action| move |source| ImageError::Io { path: path.display().to_string(), action, source };
    let mut file = File::open(path).map_err(failed("open"))?;
    ends(&mut file).map_err(failed("read"))
}

/// The first bytes, and the last sector.
fn ends(file: &mut File) -> io::Result<(Vec<u8>, Vec<u8>)> {
    let (mut start, mut footer) = (Vec::with_capacity(START), Vec::with_capacity(FOOTER));
    file.take(START as u64).read_to_end(&mut start)?;
    // The end of a block device too is found by seeking.
    let length = file.seek(SeekFrom::End(0))?;
    if length >= FOOTER as u64 {
        file.seek(SeekFrom::Start(length - FOOTER as u64))?;
        file.take(FOOTER as u64).read_to_end(&mut footer)?;
    }
    Ok((start, footer))
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    /// A format with the start and the footer that it is known by.
    fn contents() -> Vec<(ImageFormat, Vec<u8>, Vec<u8>)> {
        let mut vdi = vec![0; 512];
        vdi[64..68].copy_from_slice(b"\x7f\x10\xda\xbe");
        let start = |magic: &[u8]| [magic, &[0; 400]].concat();
        vec![
            (ImageFormat::Qcow2, start(b"QFI\xfb"), vec![0; 512]),
            (ImageFormat::Vmdk, start(b"KDMV"), vec![0; 512]),
            (ImageFormat::Vmdk, start(b"COWD"), vec![0; 512]),
            (ImageFormat::Vmdk, start(b"# Disk DescriptorFile\n"), vec![]),
            (ImageFormat::Vhdx, start(b"vhdxfile"), vec![0; 512]),
            (ImageFormat::Vdi, vdi, vec![0; 512]),
            (ImageFormat::Vpc, start(b"conectix"), start(b"conectix")),
            (ImageFormat::Vpc, vec![0; 512], start(b"conectix")),
        ]
    }

    fn detect(name: &str, start: &[u8], footer: &[u8]) -> Result<Option<ImageFormat>, ImageError> {
        ImageFormat::detect(Path::new(name), start, footer)
    }

    #[test]
    fn a_container_is_taken_where_name_and_content_agree() {
        for (format, start, footer) in contents() {
            let name = format!("/vm/Disk.one.{}", format.to_string().to_uppercase());
            assert_eq!(detect(&name, &start, &footer).unwrap(), Some(format));
            // The guest of a raw disk can write any of these.
            for name in ["/vm/disk.raw", "/vm/disk.img", "/vm/qcow2", "/vm/disk.qcow2.bak", "/dev/sda"] {
                let refused = detect(name, &start, &footer).unwrap_err();
                assert!(matches!(refused, ImageError::Unnamed { format: found, .. } if found == format), "{refused}");
                let said = refused.to_string();
                assert!(said.contains(&format!("--format {format}")) && said.contains("--raw"), "{said}");
            }
        }
        assert_eq!(detect("d.vpc", b"conectix", b"").unwrap(), Some(ImageFormat::Vpc));
    }

    #[test]
    fn a_name_that_promises_too_much_is_refused() {
        for name in ["d.qcow2", "d.vmdk", "d.vhdx", "d.vdi", "d.vhd", "d.vpc", "d.luks"] {
            let refused = detect(name, &[0; 512], &[0; 512]).unwrap_err();
            assert!(matches!(refused, ImageError::Misnamed { .. }), "{refused}");
        }
        let refused = detect("d.vmdk", b"QFI\xfb", b"").unwrap_err();
        assert!(matches!(refused, ImageError::Unnamed { format: ImageFormat::Qcow2, .. }), "{refused}");
    }

    /// Extents of raw bytes are named like VMDKs: their guest could write a descriptor that names any file of the host.
    #[test]
    fn extents_of_raw_bytes_are_never_taken_for_a_vmdk() {
        for name in ["web01-flat.vmdk", "web01-FLAT.vmdk", "web01-f001.vmdk", "a-b-f12.vmdk"] {
            assert_eq!(detect(name, &[0; 512], &[0; 512]).unwrap(), None);
            assert!(matches!(detect(name, b"# Disk DescriptorFile", b""), Err(ImageError::Unnamed { .. })));
        }
        for name in ["flat.vmdk", "web01-f.vmdk", "web01-000001.vmdk", "x-s001.vmdk"] {
            assert_eq!(detect(name, b"KDMV", b"").unwrap(), Some(ImageFormat::Vmdk));
        }
    }

    #[test]
    fn what_a_guest_encrypts_itself_is_a_raw_disk() {
        assert_eq!(detect("d.raw", b"LUKS\xba\xbe\0\x01", &[0; 512]).unwrap(), None);
        assert_eq!(detect("d.luks", b"LUKS\xba\xbe\0\x01", &[0; 512]).unwrap(), Some(ImageFormat::Luks));
    }

    #[test]
    fn what_the_user_names_is_taken() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("disk");
        fs::write(&path, b"QFI\xfb").unwrap();
        assert!(decide(&path, None).is_err());
        assert_eq!(decide(&path, Some(ImageFormat::Raw)).unwrap(), None);
        assert_eq!(decide(&path, Some(ImageFormat::Vdi)).unwrap(), Some(ImageFormat::Vdi));
        for short in [&b""[..], b"x", &[0; 511]] {
            fs::write(&path, short).unwrap();
            assert_eq!(decide(&path, None).unwrap(), None);
        }
        assert!(matches!(decide(folder.path().join("none").as_path(), None), Err(ImageError::Io { .. })));
    }

    #[test]
    fn names_of_formats_are_read_back() {
        for format in ImageFormat::ALL {
            assert_eq!(format.to_string().parse::<ImageFormat>().unwrap(), format);
            assert_eq!(format.driver().parse::<ImageFormat>().unwrap(), format);
        }
        assert!("QCOW2,x".parse::<ImageFormat>().unwrap_err().to_string().contains("qcow2"));
    }
}
