//! What is read and written, and who serves it: the newest day in a vault, in a raw file, and in a qcow2 image with LUKS.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use crate::contender::{Contender, DISK, Mount, PASSPHRASE, renewed};
use crate::fakefs;
use crate::host::{self, DAYS, Disks};
use crate::luks::Luks;
use crate::null;
use crate::plan::Plan;
use crate::process::{self, Server};
use crate::reseal::{Reseal, VM};
use crate::{Result, round};

/// How long a server may take until its socket is there.
const START: Duration = Duration::from_secs(20);

/// The sides, prepared.
pub(super) struct Stands {
    home: PathBuf,
    reseal: Reseal,
    luks: Luks,
    raw: PathBuf,
}

/// An export, for as long as it is served.
pub(super) struct Export {
    socket: PathBuf,
    _server: Server,
}

/// A disk as a file, for as long as it is served.
pub(super) struct Served(Mount);

impl Export {
    pub(super) fn socket(&self) -> &Path {
        &self.socket
    }

    pub(super) fn uri(&self) -> String {
        format!("nbd+unix:///?socket={}", self.socket.display())
    }
}

impl Served {
    pub(super) fn file(&self) -> &Path {
        &self.0.file
    }
}

impl Stands {
    /// Backs up all days, and converts the newest.
    pub(super) fn new(plan: &Plan, disks: &Disks) -> Result<Stands> {
        let home = plan.work.join("recovery");
        renewed(&home)?;
        let home = home.canonicalize()?;
        let (mut reseal, mut luks) = (Reseal::at(plan, "recovery/reseal"), Luks::at(plan, "recovery/luks"));
        reseal.renew()?;
        luks.renew()?;
        let source = home.join("source");
        for day in DAYS {
            round::present(&disks.path(day), &source)?;
            reseal.backup(day, &source)?;
            luks.backup(day, &source)?;
        }
        Ok(Stands { home, reseal, luks, raw: source.join(DISK) })
    }

    /// Bytes of the disk that are in use, in MB.
    pub(super) fn used_mb(&self) -> Result<f64> {
        Ok(host::stored_mib(&self.raw)? * f64::from(1 << 20) / 1e6)
    }

    /// Nothing of the repositories is in memory, and the programs are.
    fn cold(&self) -> Result<()> {
        host::drop_caches()?;
        self.reseal.warm()?;
        for program in ["qemu-nbd", "qemu-storage-daemon", "fio", "nbdcopy"] {
            process::output(Command::new(program).arg("--version"))?;
        }
        Ok(())
    }

    fn serve(&self, command: &mut Command, socket: PathBuf) -> Result<Export> {
        let log = self.home.join("export.log");
        let mut server = Server::start(command, &log)?;
        let began = Instant::now();
        while !socket.exists() {
            server
                .running()
                .map_err(|error| format!("{error}: {}", std::fs::read_to_string(&log).unwrap_or_default()))?;
            if began.elapsed() > START {
                return Err("the export does not appear".into());
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        Ok(Export { socket, _server: server })
    }

    fn socket(&self) -> Result<PathBuf> {
        let socket = self.home.join("nbd.socket");
        match std::fs::remove_file(&socket) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(error.into()),
            _ => Ok(socket),
        }
    }

    /// The restore point.
    pub(super) fn export(&self, arguments: &[&str]) -> Result<Export> {
        self.cold()?;
        let socket = self.socket()?;
        let mut command = self.reseal.command();
        command.args(["nbd", &format!("{VM}@latest"), "--socket"]).arg(&socket).args(arguments);
        self.serve(&mut command, socket)
    }

    /// The image with LUKS.
    pub(super) fn luks_export(&self) -> Result<Export> {
        self.cold()?;
        self.qemu_nbd(&["--read-only"], &self.luks.node())
    }

    fn qemu_nbd(&self, arguments: &[&str], node: &str) -> Result<Export> {
        let socket = self.socket()?;
        let mut command = Command::new("qemu-nbd");
        command.args(["--persistent", "--shared=16", "--object", &Luks::secret()]).args(arguments);
        command.arg("--socket").arg(&socket).args(["--image-opts", node]);
        self.serve(&mut command, socket)
    }

    /// The restore point in a mount.
    pub(super) fn mount(&self) -> Result<Served> {
        self.cold()?;
        self.reseal.mounted(&[], &format!("{VM}/latest/disk-0.raw")).map(Served)
    }

    /// The restore point in a mount, to be written to.
    pub(super) fn writable_mount(&self) -> Result<Served> {
        self.cold()?;
        let mut mount = self.reseal.mounted(&[&format!("{VM}@latest"), "--writable", "--one-time"], VM)?;
        // It shows one point, which is named by its time.
        let point = std::fs::read_dir(&mount.file)?.next().ok_or("the mount shows no restore point")??;
        mount.file = point.path().join("disk-0.raw");
        Ok(Served(mount))
    }

    fn pass(&self, image: &Path, mode: &str) -> Result<Served> {
        self.cold()?;
        let mountpoint = self.home.join("passed");
        std::fs::create_dir_all(&mountpoint)?;
        let mut command = Command::new(std::env::current_exe()?);
        command.arg("pass-fs").arg(&mountpoint).arg(image).arg(mode);
        let file = mountpoint.join(fakefs::FILE);
        let mount = Mount::foreground(&mut command, mountpoint, file)?;
        null::raise_readahead(&mount.file)?;
        Ok(Served(mount))
    }

    /// The raw file behind a FUSE file system that passes everything through.
    pub(super) fn passed_through(&self) -> Result<Served> {
        self.pass(&self.raw, "ro")
    }

    /// A copy of it, to be written to.
    pub(super) fn passed_through_to_write(&self) -> Result<Served> {
        let copy = self.home.join("copy.raw");
        if !copy.exists() {
            process::run(Command::new("cp").arg("--sparse=always").arg(&self.raw).arg(&copy))?;
        }
        self.pass(&copy, "rw")
    }

    /// A new and empty qcow2 image with LUKS over the raw file, as the options of a block node.
    fn overlay(&self) -> Result<String> {
        let image = self.home.join("overlay.qcow2");
        let make = || {
            let mut command = Command::new("qemu-img");
            command
                .args(["create", "-q", "-f", "qcow2", "--object", &Luks::secret(), "-F", "raw", "-b"])
                .arg(&self.raw);
            let options = "encrypt.format=luks,encrypt.key-secret=key,encrypt.iter-time=10,encrypt.hash-alg=sha512";
            command.args(["-o", options]).arg(&image);
            process::run(&mut command)
        };
        // It measures how long a key derivation takes, and now and then finds that it can't.
        (0..20).fold(make(), |made, _| made.or_else(|_| make()))?;
        Ok(format!(
            "driver=qcow2,encrypt.format=luks,encrypt.key-secret=key,file.driver=file,file.filename={},backing.driver=raw,\
             backing.file.driver=file,backing.file.filename={}",
            image.display(),
            self.raw.display()
        ))
    }

    /// Such an overlay through QEMU's FUSE export.
    pub(super) fn luks_overlay(&self) -> Result<Served> {
        let node = self.overlay()?;
        self.cold()?;
        let mountpoint = self.home.join("overlay.mnt");
        std::fs::write(&mountpoint, [])?;
        let mut command = Command::new("qemu-storage-daemon");
        let secret = format!("secret,id=key,data={PASSPHRASE}");
        command.args(["--object", &secret, "--blockdev", &format!("{node},node-name=disk")]);
        let export = format!("fuse,id=export,node-name=disk,writable=on,mountpoint={}", mountpoint.display());
        command.args(["--export", &export]);
        Mount::foreground(&mut command, mountpoint.clone(), mountpoint).map(Served)
    }

    /// Such an overlay through NBD.
    pub(super) fn luks_overlay_export(&self) -> Result<Export> {
        let node = self.overlay()?;
        self.cold()?;
        self.qemu_nbd(&[], &node)
    }
}
