//! `reseal backup`

use std::io::Read;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use reseal_cli::{
    CommonArgs, Failure, Opened, Output, Progress, Status, hold_keys, human_bytes, human_duration, parse_size,
};
use reseal_format::frames::FrameShift;
use reseal_format::manifest::{Definition, MAX_DEFINITION, Manifest};
use reseal_format::names::VmName;
use reseal_site::{Enrolment, enrolment};
use reseal_vault::Pins;
use reseal_writer::backup::{Backup, Disks, Encoding, Vault};
use reseal_writer::remote::Sent;
use reseal_writer::status::{Attempt, Results};
use reseal_writer::throttle::Throttle;
use serde::Serialize;

use super::sources;
use super::{PointJson, cores};

/// Arguments of `backup`.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// Name of the VM in the vault
    vm: String,
    #[command(flatten)]
    sources: sources::SourceArgs,
    /// The VM's definition, such as libvirt's XML, kept with the restore point
    #[arg(long, value_name = "FILE")]
    definition: Option<PathBuf>,
    /// Reads at most so many bytes a second, as 50M or 1G
    #[arg(long, value_name = "BYTES", value_parser = parse_size)]
    limit_rate: Option<u64>,
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
    let (output, began) = (common.output(), Instant::now());
    let vm = VmName::new(&args.vm).map_err(|e| Failure::of(Status::Usage, &e))?;
    let mut results = None;
    let made = back_up(common, args, vm.clone(), began, &mut results);
    let Some(results) = results else { return made.map(drop) };
    let (attempt, made) = match made {
        Ok(attempt) => (attempt, Ok(())),
        Err(failure) => (Attempt::failed(began, &failure), Err(failure)),
    };
    if let Err(e) = results.note(&vm, attempt) {
        output.warn(format!("`reseal status` will not know of this: {e}"));
    }
    made
}

/// Makes a restore point. `results` is where what became of it is kept, as soon as that is known.
fn back_up(
    common: &CommonArgs,
    args: Args,
    vm: VmName,
    began: Instant,
    results: &mut Option<Results>,
) -> Result<Attempt, Failure> {
    let output = common.output();
    let state = common.paths()?.state;
    let encoding = args.encoding();
    let definition = args.definition.as_deref().map(read_definition).transpose()?;
    let named = args.sources.named()?;
    let opened = match enrolment(common)? {
        Some(enrolment) => {
            common.refuse_recovery_kit()?;
            *results = Some(Results::of_site(&state, &enrolment));
            To::Site(enrolment)
        }
        None => {
            let found = common.find(&common.tenant()?)?;
            *results = Some(Results::of_tenant(&state, &found.record.scope()));
            To::Vault(common.open_found(found)?)
        }
    };
    let _lease = match &opened {
        To::Vault(opened) => hold_keys(&opened.tenant, format!("backup of {vm}"), Pins::Nothing),
        To::Site(_) => None,
    };
    let disks = args.sources.open(named, &state, &|number| match &opened {
        To::Vault(opened) => sources::number_of(number, &vm, opened),
        To::Site(_) => sources::given_number(number, &vm),
    })?;
    let total = match &disks {
        Disks::Given(inputs) => inputs.iter().map(|input| input.source.expected()).sum(),
        Disks::Live(_) => 0,
    };
    let progress = Progress::bytes(output, &args.vm, total);
    let backup = Backup {
        vm,
        disks,
        definition,
        copy_of: None,
        encoding,
        workers: cores(),
        throttle: args.limit_rate.map(Throttle::new),
        progress: &|bytes| progress.add(bytes),
        expect: &|bytes| progress.expect(bytes),
        say: &|warning| output.warn(warning),
    };
    match opened {
        To::Vault(opened) => {
            let to = Vault { tenant: opened.tenant, heads: &opened.heads, state: opened.paths.state };
            let result = backup.run(to);
            progress.finish();
            let backed = result?;
            summarize(output, &backed.manifest);
            if let Some(e) = backed.not_remembered {
                output.warn(format!("the restore point is made, but this machine could not remember it: {e}"));
            }
            Ok(Attempt::made(began, &backed.manifest))
        }
        To::Site(enrolment) => {
            let result = backup.send(&enrolment);
            progress.finish();
            let sent = result?;
            summarize_sent(output, &sent);
            Ok(Attempt::sent(began, &sent))
        }
    }
}

/// Where a backup goes.
enum To {
    Vault(Opened),
    Site(Enrolment),
}

/// A restore point at another site as `--json` prints it. Stable: fields are only ever added.
#[derive(Serialize)]
struct SentJson<'a> {
    vm: &'a VmName,
    number: u32,
    time: String,
    point_id: String,
    stats: SentStats,
    warnings: &'a [String],
}

#[derive(Serialize)]
struct SentStats {
    read: u64,
    changed: u64,
    sent: u64,
    duration_ms: u64,
}

fn summarize_sent(output: Output, sent: &Sent) {
    output.json(&SentJson {
        vm: &sent.vm,
        number: sent.number,
        time: sent.created.to_string(),
        point_id: sent.point.to_string(),
        stats: SentStats {
            read: sent.read,
            changed: sent.changed,
            sent: sent.sent,
            duration_ms: u64::try_from(sent.duration.as_millis()).unwrap_or(u64::MAX),
        },
        warnings: &sent.warnings,
    });
    for warning in &sent.warnings {
        output.warn(warning);
    }
    output.say(format!(
        "{}@{} {}: read {}, changed {}, sent {}, in {}",
        sent.vm,
        sent.number,
        sent.created,
        human_bytes(sent.read),
        human_bytes(sent.changed),
        human_bytes(sent.sent),
        human_duration(sent.duration),
    ));
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
    output.json(&PointJson::new(manifest, None, None));
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
