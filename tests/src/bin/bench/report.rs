//! The document: docs/BENCHMARKS.md, written anew by each full run.

use std::fmt::Write;

use crate::live::Figure;
use crate::plan::Plan;
use crate::samples::{Quantity, Samples, Spread, Tool};
use crate::targets::{self, Against, Target};
use crate::{Result, host};

pub(crate) fn write(plan: &Plan, samples: &Samples) -> Result<()> {
    let text = document(plan, samples)?;
    let output = plan.output(samples);
    if let Some(folder) = output.parent() {
        std::fs::create_dir_all(folder)?;
    }
    std::fs::write(&output, text)?;
    eprintln!("bench: wrote {}", output.display());
    Ok(())
}

fn document(plan: &Plan, samples: &Samples) -> Result<String> {
    let mut text = String::from(INTRODUCTION);
    writeln!(text, "Taken on {}. The machine: {}.\n", host::today(), host::describe(&plan.work))?;
    if samples.idle_percent < crate::BUSY {
        let idle = samples.idle_percent;
        writeln!(
            text,
            "**The machine was busy with something else** (at worst {idle:.0} % idle before a turn): take it again.\n"
        )?;
    }
    text.push_str("## Targets\n\n| quantity | must reach | measured | |\n| --- | --- | --- | --- |\n");
    for target in targets::all() {
        let verdict = target.judge(samples);
        let measured = verdict.measured.as_deref().unwrap_or("");
        writeln!(text, "| {} | {} | {measured} | {} |", title(target.quantity), verdict.bound, verdict.state())?;
    }
    tools(&mut text, samples)?;
    disk(&mut text, samples)?;
    for (quantity, title, unit, digits) in Quantity::PRINTED {
        table(&mut text, samples, quantity, title, (unit, digits))?;
    }
    memory(&mut text, samples)?;
    figures(&mut text, "Live sources", &samples.live)?;
    figures(&mut text, "New keys", &samples.rekey)?;
    figures(&mut text, "Two sites", &samples.remote)?;
    figures(&mut text, "Many tenants", &samples.tenants)?;
    figures(&mut text, "Instant recovery", &samples.recovery)?;
    figures(&mut text, "Giving back space", &samples.prune)?;
    figures(&mut text, "An object store", &samples.objects)?;
    text.push_str(METHOD);
    Ok(text)
}

fn title(quantity: Quantity) -> &'static str {
    Quantity::PRINTED.iter().find(|(printed, ..)| *printed == quantity).map_or("", |(_, title, ..)| title)
}

fn tools(text: &mut String, samples: &Samples) -> Result<()> {
    text.push_str("\n## Tools\n\n| name here | what it is |\n| --- | --- |\n");
    for tool in &samples.tools {
        let reason = tool.left_out.as_deref().map(|reason| {
            // Where the work is done on this machine says nothing to a reader.
            let workspace = env!("CARGO_MANIFEST_DIR").trim_end_matches("tests");
            format!("left out: {}", reason.lines().next().unwrap_or_default().replace(workspace, ""))
        });
        let parts: Vec<&str> = [Some(tool.about.as_str()), reason.as_deref()]
            .into_iter()
            .flatten()
            .filter(|part| !part.is_empty())
            .collect();
        writeln!(text, "| {} | {} |", tool.name, parts.join("; "))?;
    }
    Ok(())
}

fn disk(text: &mut String, samples: &Samples) -> Result<()> {
    text.push_str("\n## The disk\n\nA bootable Debian 12 with a database, made by `tests/scripts/debian-disk.sh`, and two days of changes:\n\n");
    for line in samples.disks.lines() {
        writeln!(text, "- {line}")?;
    }
    writeln!(text, "- the recorded boot of day 2: {}", samples.trace)?;
    Ok(())
}

fn table(
    text: &mut String,
    samples: &Samples,
    quantity: Quantity,
    title: &str,
    (unit, digits): (&str, usize),
) -> Result<()> {
    let measured: Vec<(&Tool, Spread)> =
        samples.tools.iter().filter_map(|tool| Some((tool, tool.spread(quantity)?))).collect();
    if measured.is_empty() {
        return Ok(());
    }
    let heading = if title.starts_with('…') { "" } else { "## " };
    writeln!(
        text,
        "\n{heading}{title}\n\n| | median, {unit} | least to most (samples) | reseal is better by | target |\n| --- | --- | --- | --- | --- |"
    )?;
    let reseal = samples.median("reseal", quantity);
    let targets = targets::all();
    for (tool, spread) in measured {
        let better =
            reseal.filter(|_| tool.name != "reseal").map(|own| targets::advantage(quantity, own, spread.median));
        writeln!(
            text,
            "| {} | {:.digits$} | {:.digits$} to {:.digits$} ({}) | {} | {} |",
            tool.name,
            spread.median,
            spread.least,
            spread.most,
            spread.count,
            better.map(|better| format!("{better:.2} ×")).unwrap_or_default(),
            target_cell(&targets, samples, quantity, &tool.name),
        )?;
    }
    Ok(())
}

fn target_cell(targets: &[Target], samples: &Samples, quantity: Quantity, tool: &str) -> String {
    let concerns = |target: &&Target| {
        target.quantity == quantity
            && match target.against {
                Against::Tool(other, _) => other == tool,
                Against::Most(_) => tool == "reseal",
            }
    };
    let Some(target) = targets.iter().find(concerns) else { return String::new() };
    let verdict = target.judge(samples);
    format!("{}: {}", verdict.bound, verdict.state())
}

fn memory(text: &mut String, samples: &Samples) -> Result<()> {
    if samples.memory.is_empty() {
        return Ok(());
    }
    text.push_str("\n## Peak memory of reseal by the size of the disk, MiB\n\n| disk | first backup | second, unchanged | mount, read all over |\n| --- | --- | --- | --- |\n");
    for case in &samples.memory {
        writeln!(
            text,
            "| {} | {:.0} | {:.0} | {:.0} |",
            case.disk, case.backup_mib, case.second_backup_mib, case.mount_mib
        )?;
    }
    Ok(())
}

fn figures(text: &mut String, title: &str, figures: &[Figure]) -> Result<()> {
    if figures.is_empty() {
        return Ok(());
    }
    writeln!(text, "\n## {title}\n\n| what | must reach | measured | |\n| --- | --- | --- | --- |")?;
    for figure in figures {
        let state = match figure.met {
            Some(true) => "met",
            Some(false) => "**not met**",
            None => "",
        };
        writeln!(text, "| {} | {} | {} | {state} |", figure.what, figure.bound, figure.measured)?;
    }
    Ok(())
}

const INTRODUCTION: &str = "\
# Benchmarks

reseal beside the tools that users would pick instead. Written by `make bench`, which takes everything in one go: do not
edit by hand.

";

const METHOD: &str = "
## How it was taken

All tools take their turns within each round, and each round begins with another tool; a figure is the median over the rounds.

- **Backup**: into an empty repository, then day 1 and day 2 into the same; nothing says what changed. The source is in the page
  cache. From the start of the program to its end. QEMU has no restore points: it converts day 2's disk once.
- **Stored**: the lengths of all files of the repository, less their holes; local caches elsewhere are not counted.
- **Mount**: day 2 is mounted anew for each reading, the whole page cache dropped before, the tool's program loaded again: repository
  cold, program warm. From the start of the command until 512 bytes have been read from the disk in the mount.
- **Sequential**: `dd bs=1M count=1000`.
- **Random**: `fio --rw=randread --bs=4k --ioengine=psync --direct=0` over 1200 MiB for at most 6 s, no block twice; four readers have 300 MiB each.
- **Boot**: the reads that the emulator made while day 2 booted to its login prompt, recorded once from the raw image below the guest's page
  cache, replayed by one thread, one after the other, as fast as they are answered.
- **Restore**: the newest point to a file, page cache dropped before; from the start of the program to its end, without a final sync. The first
  round compares the file with the source.
- **Peak memory**: the most that was ever resident: of a backup, of the program and what it started, the largest of the three; of a mount,
  of the process that serves it, the largest of the four.
- **Live sources**: `qemu-nbd` on a Unix socket, the image in the page cache; medians of at least three. Day 2 by a bitmap: an overlay in whose
  bitmap QEMU recorded the writes that make day 2 of day 1. The writer is `fio` (64 KiB, `--rate`, 10 s) on a FUSE export of the disk of a
  QEMU whose disk is backed up through `--qmp` meanwhile.
- **New keys**: `reseal rekey --kek` for a tenant of 100 restore points, from the start of the program to its end, OpenBao and PyKMIP on this
  machine over TLS; median of at least three, after each of which the vault's files are compared with before. `reseal rekey --data`: median of as many, page cache warm.
- **Two sites**: a source and a target in two folders of this machine, `reseal serve` on the loopback interface, medians of at least three; the bytes sent are
  counted by a proxy, TLS included. The long line is a proxy that holds back each byte for 50 ms either way, and the source's by 25 MB/s.
- **Many tenants**: a server and 50 sources on this machine, started as fast as can be; a source counts from the start of the first to its own end.
- **Instant recovery**: day 2, each side started anew for each reading, the page cache dropped and programs loaded before; medians of at least three rounds in
  turns. The reads of a boot as above, over NBD by a client with one request on its way; the raw file is behind a FUSE file system that passes everything
  through, with threads and options as reseal's mount. Random reads: `fio --ioengine=nbd` over 1200 MiB for at most 6 s, no block twice. Writes: `fio --rw=randwrite --bs=4k
  --fsync=32` over the same part, for as long, one at a time, the last fsync included; overlays are empty before. LUKS: qcow2 images of QEMU; as an overlay, over the raw file.
- **Giving back space**: vaults that are made through the commit path, without disks. The chain: a disk of 10 GiB, a quarter of it in use at first; each point has 64 other clusters in
  8 runs, 9 of 10 in a tenth of the disk; the newest 100 stay. The large tenant: 10 million clusters in one point, 5 of each 8 of them others in the next; the first is forgotten. What is read is the kernel's count for
  the whole program (`rchar`), its own libraries and tables included.
- **An object store**: SeaweedFS on this machine, each object made by one request; for backups also Ceph with one OSD (BlueStore on a file) and its gateway. For what takes longer, a proxy before SeaweedFS that holds back each request. Of a backup: the base image, page
  cache warm, medians of three in turns; *at most* is how fast it would be if all cores were at work all the time, with the store's own work on them, and the line took nothing. Of mounts: all
  data of its disk in order; the cache is empty, and then has what the first mount read.
- **null**: a FUSE file system of one file of constant bytes: the limit of every mount here.
";
