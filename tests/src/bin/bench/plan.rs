//! What to run and where: from the arguments and the environment.

use std::path::{Path, PathBuf};

use crate::Result;
use crate::samples::Samples;

/// Fewer rounds have no median worth printing.
const ROUNDS: usize = 3;

pub(crate) struct Plan {
    pub(crate) workspace: PathBuf,
    /// Repositories, mounts and samples of this run (RESEAL_BENCH_DIR).
    pub(crate) work: PathBuf,
    /// Disks, the other tools and the boot's reads, kept between runs (RESEAL_CACHE).
    pub(crate) cache: PathBuf,
    /// Where this program lies: `reseal` lies beside it.
    pub(crate) programs: PathBuf,
    pub(crate) rounds: usize,
    only: Option<Vec<String>>,
    output: Option<PathBuf>,
}

impl Plan {
    pub(crate) fn parse(arguments: &[String]) -> Result<Self> {
        let workspace = Path::new(env!("CARGO_MANIFEST_DIR")).parent().ok_or("the workspace has no folder")?.to_owned();
        let folder = |variable: &str, default: &str| match std::env::var_os(variable) {
            Some(value) => PathBuf::from(value),
            None => workspace.join(default),
        };
        let work = folder("RESEAL_BENCH_DIR", "target/bench");
        let programs = std::env::current_exe()?.parent().ok_or("this program has no folder")?.to_owned();
        let mut plan = Self {
            cache: folder("RESEAL_CACHE", ".cache"),
            output: None,
            workspace,
            work,
            programs,
            rounds: ROUNDS,
            only: None,
        };
        plan.apply(arguments)?;
        Ok(plan)
    }

    fn apply(&mut self, arguments: &[String]) -> Result<()> {
        let mut rest = arguments.iter();
        while let Some(option) = rest.next() {
            let value = rest.next().ok_or_else(|| format!("{option} needs a value"))?;
            match option.as_str() {
                "--rounds" => self.rounds = value.parse()?,
                "--only" => self.only = Some(value.split(',').map(str::to_owned).collect()),
                "--output" => self.output = Some(PathBuf::from(value)),
                _ => return Err(format!("unknown option {option}: --rounds N, --only NAME,…, --output FILE").into()),
            }
        }
        Ok(())
    }

    /// Where the document goes. A partial run is for trying things out: it does not replace the project's.
    pub(crate) fn output(&self, samples: &Samples) -> PathBuf {
        match &self.output {
            Some(output) => output.clone(),
            None if samples.rounds("reseal") >= ROUNDS && samples.rounds("borg") >= ROUNDS => {
                self.workspace.join("docs/BENCHMARKS.md")
            }
            None => self.work.join("BENCHMARKS.md"),
        }
    }

    pub(crate) fn includes(&self, name: &str) -> bool {
        self.only.as_ref().is_none_or(|only| only.iter().any(|wanted| wanted == name))
    }
}
