//! Commands of `reseal-mount`, which is found beside this program only and must be of the same version.

use std::ffi::OsString;
use std::os::unix::process::CommandExt;
use std::process::Command;

use reseal_cli::{Failure, Status};

/// Variable by which `reseal-mount` learns which version it must be.
const EXPECT_VERSION: &str = "RESEAL_EXPECT_VERSION";
/// The commands that are passed on.
const VERBS: [&str; 6] = ["mount", "umount", "restore", "nbd", "boot", "overlay"];

/// Common options that are followed by a value.
const TAKE_VALUES: [&str; 11] = [
    "--repo",
    "--tenant",
    "--keyring",
    "--keyring-passphrase-file",
    "--kms-config",
    "--recovery-kit",
    "--recovery-passphrase-file",
    "--recovery-identity",
    "--state",
    "--store-cache",
    "--store-cache-size",
];

/// Whatever the other program takes.
#[derive(clap::Args)]
#[command(disable_help_flag = true)]
pub(crate) struct Args {
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    _rest: Vec<OsString>,
}

/// Passes a command line on if its first word that is no option is such a command. Options before it are passed on too.
pub(crate) fn early(arguments: impl Iterator<Item = OsString>) -> Option<Result<(), Failure>> {
    let rest: Vec<OsString> = arguments.skip(1).collect();
    let verb = rest.first()?.to_str()?;
    VERBS.contains(&verb).then(|| start(&rest))
}

/// Passes on a command whose options stood before it, as it was typed.
pub(crate) fn run(verb: &str) -> Result<(), Failure> {
    let typed: Vec<OsString> = std::env::args_os().skip(1).collect();
    // A word after an option that takes a value is that value, even if it spells the command.
    let is_value = |at: usize| at > 0 && TAKE_VALUES.iter().any(|option| typed[at - 1] == *option);
    let at = (0..typed.len()).find(|&at| typed[at] == verb && !is_value(at)).unwrap_or(0);
    let (before, after) = typed.split_at(at);
    start(&[&after[..1], before, &after[1..]].concat())
}

fn start(arguments: &[OsString]) -> Result<(), Failure> {
    let failed = |what: String| Failure::new(Status::Failed, what);
    let own = std::env::current_exe().map_err(|e| failed(format!("can't find this program's own folder: {e}")))?;
    let program = own.with_file_name("reseal-mount");
    let mut command = Command::new(&program);
    let error = command.args(arguments).env(EXPECT_VERSION, env!("CARGO_PKG_VERSION")).exec();
    let place = program.display();
    Err(failed(format!(
        "can't start {place}: {error}; install reseal-mount of version {} there",
        env!("CARGO_PKG_VERSION")
    )))
}
