//! `reseal backup`

use std::ffi::OsString;
use std::io::Read;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use reseal_cli::{CommonArgs, Failure, Output, Progress, Status, human_bytes, human_duration};
use reseal_format::frames::FrameShift;
use reseal_format::manifest::{Definition, MAX_DEFINITION, MAX_DISKS, Manifest};
use reseal_format::names::{DiskName, VmName};
use reseal_writer::backup::{Backup, Encoding};
use reseal_writer::source::Source;

use super::{PointJson, cores};

/// Name of a disk that is the only one and was given none.
const ONLY_DISK: &str = "disk-0";

/// Arguments of `backup`.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// Name of the VM in the vault
    vm: String,
    /// Raw files or block devices; several must be named, as NAME=PATH
    #[arg(required = true, value_name = "[NAME=]DISK")]
    disks: Vec<OsString>,
    /// The VM's definition, such as libvirt's XML, kept with the restore point
    #[arg(long, value_name = "FILE")]
    definition: Option<PathBuf>,
    /// Takes the bytes of the disks as they are, even if they look like an image container
    #[arg(long)]
    raw: bool,
    /// Size of a frame in KiB, to measure with
    #[arg(long, hide = true, value_parser = ["16", "32", "64"])]
    frame: Option<String>,
    /// zstd level, to measure with
    #[arg(long, hide = true, value_parser = clap::value_parser!(i32).range(-7..=19))]
    level: Option<i32>,
}

impl Args {
    fn encoding(&self) -> Encoding {
        let shift = match self.frame.as_deref() {
            Some("16") => FrameShift::K16,
            Some("32") => FrameShift::K32,
            Some("64") => FrameShift::K64,
            _ => Encoding::DEFAULT.shift,
        };
        Encoding { shift, level: self.level.unwrap_or(Encoding::DEFAULT.level) }
    }
}

pub(crate) fn run(common: &CommonArgs, args: Args) -> Result<(), Failure> {
    let output = common.output();
    let usage = |message: String| Failure::new(Status::Usage, message);
    let vm = VmName::new(&args.vm).map_err(|e| Failure::of(Status::Usage, &e))?;
    let named = name_disks(&args.disks).map_err(usage)?;
    let encoding = args.encoding();
    let definition = args.definition.as_deref().map(read_definition).transpose()?;
    let opened = common.open()?;
    let mut disks = Vec::new();
    for (name, path) in named {
        disks.push((name, Source::open(Path::new(&path), args.raw)?));
    }
    let total = disks.iter().map(|(_, source)| source.expected()).sum();
    let progress = Progress::bytes(output, &args.vm, total);
    let backup = Backup {
        tenant: opened.tenant,
        heads: &opened.heads,
        state: opened.paths.state,
        vm,
        disks,
        definition,
        encoding,
        workers: cores(),
        progress: &|bytes| progress.add(bytes),
    };
    let result = backup.run();
    progress.finish();
    let backed = result?;
    summarize(output, &backed.manifest);
    if let Some(e) = backed.not_remembered {
        output.warn(format!("the restore point is made, but this machine could not remember it: {e}"));
    }
    Ok(())
}

/// Splits NAME=PATH. A path that has a slash before its first `=` is no name; `./a=b.raw` is one way to write such a path.
fn name_disks(disks: &[OsString]) -> Result<Vec<(DiskName, OsString)>, String> {
    if disks.len() > MAX_DISKS {
        return Err(format!("a VM has at most {MAX_DISKS} disks"));
    }
    let mut named: Vec<(DiskName, OsString)> = Vec::new();
    for disk in disks {
        let bytes = disk.as_bytes();
        if bytes.starts_with(b"nbd") && bytes.windows(3).any(|part| part == b"://") {
            return Err(format!("{}: this version reads files and block devices only", disk.display()));
        }
        let split = bytes.iter().position(|&b| b == b'=').filter(|&at| !bytes[..at].contains(&b'/'));
        let (name, path) = match split {
            Some(at) => (&bytes[..at], OsString::from_vec(bytes[at + 1..].to_vec())),
            None if disks.len() == 1 => (ONLY_DISK.as_bytes(), disk.clone()),
            None => return Err(format!("{}: of several disks each needs a name, as NAME=DISK", disk.display())),
        };
        let name = str::from_utf8(name).map_err(|_| format!("{}: its name is not UTF-8", disk.display()))?;
        let name = DiskName::new(name).map_err(|e| e.to_string())?;
        if named.iter().any(|(other, _)| *other == name) {
            return Err(format!("two disks are named {name}"));
        }
        named.push((name, path));
    }
    Ok(named)
}

fn read_definition(path: &Path) -> Result<Definition, Failure> {
    let failed = |what: String| Failure::new(Status::Usage, format!("--definition {}: {what}", path.display()));
    let file = std::fs::File::open(path).map_err(|e| failed(e.to_string()))?;
    let mut text = String::new();
    file.take(MAX_DEFINITION as u64 + 1).read_to_string(&mut text).map_err(|e| failed(e.to_string()))?;
    if text.len() > MAX_DEFINITION {
        return Err(failed(format!("longer than {}", human_bytes(MAX_DEFINITION as u64))));
    }
    // What JSON makes of it must fit a manifest too, which is known only after the disks were read.
    if serde_json::to_string(&text).map_or(usize::MAX, |json| json.len()) > MAX_DEFINITION * 3 / 2 {
        return Err(failed("it is no text: most of it are control characters".into()));
    }
    let file_name = path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
    Ok(Definition { file_name, text })
}

fn summarize(output: Output, manifest: &Manifest) {
    output.json(&PointJson::new(manifest));
    for warning in &manifest.warnings {
        output.warn(warning);
    }
    let stats = &manifest.stats;
    output.say(format!(
        "{}@{} {}: read {}, changed {}, new {}, stored {}, in {}",
        manifest.vm,
        manifest.number,
        manifest.created,
        human_bytes(stats.read),
        human_bytes(stats.changed),
        human_bytes(stats.new),
        human_bytes(stats.stored),
        human_duration(Duration::from_millis(stats.duration_ms)),
    ));
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(disks: &[&str]) -> Result<Vec<(String, String)>, String> {
        let disks: Vec<OsString> = disks.iter().map(OsString::from).collect();
        let named = name_disks(&disks)?;
        Ok(named.into_iter().map(|(n, p)| (n.to_string(), p.into_string().unwrap())).collect())
    }

    #[test]
    fn names_are_taken_from_in_front_of_the_equals_sign() {
        assert_eq!(names(&["x.raw"]).unwrap(), [("disk-0".into(), "x.raw".into())]);
        assert_eq!(names(&["a=x.raw"]).unwrap(), [("a".into(), "x.raw".into())]);
        assert_eq!(names(&["./a=x.raw"]).unwrap(), [("disk-0".into(), "./a=x.raw".into())]);
        assert_eq!(names(&["a=/x=y"]).unwrap(), [("a".into(), "/x=y".into())]);
        for wrong in [&["x", "y"][..], &["a=x", "a=y"], &["=x"], &["..=x"], &["nbd://host/x"]] {
            assert!(names(wrong).is_err(), "{wrong:?}");
        }
    }
}
