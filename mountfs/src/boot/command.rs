//! The command line of QEMU, from a machine. Nothing is looked at or made here: the same gives the same.
//!
//! What comes from a definition or names a path is in JSON where QEMU takes that, and escaped elsewhere.

use std::ffi::{OsStr, OsString};
use std::path::Path;
use std::time::Duration;

use serde_json::{Value, json};

use super::BootError;
use super::console::Console;
use super::host::{Accel, Host};
use super::machine::{Arch, Bus, Chipset, Machine, ScsiModel, device, node};
use super::network::{Forward, Network};
use super::run_folder::RunFolder;

/// Places on a controller.
const SATA_PLACES: usize = 6;
const SCSI_PLACES: usize = 7;
const VIRTIO_SCSI_PLACES: usize = 200;
/// The guest agent's channel.
const AGENT: &str = "org.qemu.guest_agent.0";

/// All that decides the command.
#[derive(Debug, Clone)]
pub struct Setup<'a> {
    pub machine: &'a Machine,
    pub host: &'a Host,
    pub folder: &'a RunFolder,
    pub network: &'a Network,
    pub forwards: &'a [Forward],
    pub console: &'a Console,
    /// How long the guest waits for an export that is gone, before it is paused.
    pub reconnect: Duration,
    /// Whether the guest's memory must not be swapped.
    pub lock_memory: bool,
    /// Whether the guest waits to be let go.
    pub paused: bool,
    /// What the operator adds, last.
    pub extra: &'a [OsString],
}

/// Words of a command line.
#[derive(Default)]
struct Words(Vec<OsString>);

impl Words {
    fn add(&mut self, option: &str, value: impl AsRef<OsStr>) {
        self.0.push(option.into());
        self.0.push(value.as_ref().to_owned());
    }

    fn json(&mut self, option: &str, value: &Value) {
        self.add(option, value.to_string());
    }
}

/// A value in a list of `key=value`, where a comma ends it.
fn escaped(text: &str) -> String {
    text.replace(',', ",,")
}

/// A path as text. QEMU's JSON is UTF-8.
fn text(path: &Path) -> Result<&str, BootError> {
    path.to_str().ok_or_else(|| BootError::Path { path: path.to_owned(), why: "it is not UTF-8" })
}

/// The program and its arguments.
pub fn command(setup: &Setup<'_>) -> Result<Vec<OsString>, BootError> {
    let mut words = Words::default();
    words.0.push(setup.host.qemu.clone().into());
    board(setup, &mut words)?;
    monitors(setup, &mut words)?;
    console(setup, &mut words)?;
    for (nth, disk) in setup.machine.disks.iter().enumerate() {
        let server = json!({ "type": "unix", "path": text(&setup.folder.nbd())? });
        words.json(
            "-blockdev",
            &json!({
                "driver": "nbd",
                "node-name": node(nth),
                "server": server,
                "export": disk.export,
                "reconnect-delay": setup.reconnect.as_secs(),
                "discard": "unmap",
                "detect-zeroes": "unmap",
            }),
        );
    }
    disks(setup.machine, &mut words);
    network(setup, &mut words);
    words.0.extend(setup.extra.iter().cloned());
    Ok(words.0)
}

fn board(setup: &Setup<'_>, words: &mut Words) -> Result<(), BootError> {
    let Setup { machine, host, folder, .. } = setup;
    words.add("-name", format!("guest={}", escaped(&machine.name)));
    words.0.extend(["-nodefaults".into(), "-no-user-config".into()]);
    let mut board = format!("{},dump-guest-core=off", machine.chipset.name());
    if let Some(files) = &host.firmware {
        let flash = |name: &str, path: &Path, read_only: bool| -> Result<Value, BootError> {
            let file = json!({ "driver": "file", "filename": text(path)?, "read-only": read_only });
            Ok(json!({ "driver": "raw", "node-name": name, "read-only": read_only, "file": file }))
        };
        words.json("-blockdev", &flash("firmware", &files.code, true)?);
        words.json("-blockdev", &flash("firmware-variables", &folder.variables(), false)?);
        board.push_str(",pflash0=firmware,pflash1=firmware-variables");
    }
    words.add("-machine", board);
    let (accel, processor) = match host.accel {
        Accel::Kvm => ("kvm", "host"),
        Accel::Tcg => ("tcg,thread=multi", "max"),
    };
    words.add("-accel", accel);
    words.add("-cpu", processor);
    words.add("-smp", format!("cpus={0},sockets=1,cores={0},threads=1", machine.cpus));
    words.add("-m", format!("size={}M", machine.memory.div_ceil(1 << 20)));
    if setup.lock_memory {
        words.add("-overcommit", "mem-lock=on");
    }
    if let Some(uuid) = &machine.uuid {
        words.add("-uuid", uuid);
    }
    words.add("-rtc", if machine.local_time { "base=localtime" } else { "base=utc" });
    let may_spawn = matches!(setup.network, Network::Bridge(_));
    words.add(
        "-sandbox",
        match may_spawn {
            // The helper that joins a bridge is a program with privileges.
            true => "on,obsolete=deny,resourcecontrol=deny",
            false => "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny",
        },
    );
    if setup.paused {
        words.0.push("-S".into());
    }
    Ok(())
}

fn monitors(setup: &Setup<'_>, words: &mut Words) -> Result<(), BootError> {
    let folder = setup.folder;
    let socket = |id: &str, path: &Path| -> Result<String, BootError> {
        Ok(format!("socket,id={id},server=on,wait=off,path={}", escaped(text(path)?)))
    };
    words.add("-pidfile", folder.pid_file());
    for (id, path) in [("qmp", folder.qmp()), ("qmp-promote", folder.qmp_promote())] {
        words.add("-chardev", socket(id, &path)?);
        words.add("-mon", format!("chardev={id},mode=control"));
    }
    words.add("-monitor", "none");
    words.json("-device", &json!({ "driver": "virtio-serial-pci", "id": "channels" }));
    words.add("-chardev", socket("agent", &folder.agent())?);
    words.json(
        "-device",
        &json!({ "driver": "virtserialport", "bus": "channels.0", "chardev": "agent", "name": AGENT }),
    );
    Ok(())
}

fn console(setup: &Setup<'_>, words: &mut Words) -> Result<(), BootError> {
    let serial = match setup.console {
        Console::None => None,
        Console::Stdio => Some("stdio,id=console,mux=on,signal=off".to_owned()),
        Console::File(path) => Some(format!("file,id=console,append=on,path={}", escaped(text(path)?))),
        Console::Socket | Console::Vnc(_) => {
            let path = setup.folder.console();
            Some(format!("socket,id=console,server=on,wait=off,path={}", escaped(text(&path)?)))
        }
    };
    match serial {
        None => words.add("-serial", "none"),
        Some(chardev) => {
            words.add("-chardev", chardev);
            words.add("-serial", "chardev:console");
        }
    }
    if *setup.console == Console::Stdio {
        // Ctrl-a x ends QEMU, Ctrl-a c is its monitor.
        words.add("-mon", "chardev=console,mode=readline");
    }
    // A screen is there though nobody may see it: systems expect one.
    let screen = if setup.machine.arch == Arch::X86_64 { "VGA" } else { "virtio-gpu-pci" };
    words.json("-device", &json!({ "driver": screen, "id": "screen" }));
    match setup.console {
        Console::Vnc(vnc) => {
            words.add("-display", format!("vnc={}", escaped(&vnc.display())));
            words.json("-device", &json!({ "driver": "qemu-xhci", "id": "usb" }));
            words.json("-device", &json!({ "driver": "usb-tablet", "bus": "usb.0" }));
            if setup.machine.arch == Arch::Aarch64 {
                words.json("-device", &json!({ "driver": "usb-kbd", "bus": "usb.0" }));
            }
        }
        _ => words.add("-display", "none"),
    }
    Ok(())
}

/// Controllers of one kind, made as they fill.
struct Controllers {
    name: &'static str,
    driver: &'static str,
    places: usize,
    taken: usize,
}

impl Controllers {
    fn new(name: &'static str, driver: &'static str, places: usize) -> Controllers {
        Controllers { name, driver, places, taken: 0 }
    }

    /// A place: the controller's id, and the number on it.
    fn place(&mut self, words: &mut Words) -> (String, usize) {
        let (nth, place) = (self.taken / self.places, self.taken % self.places);
        let id = format!("{}{nth}", self.name);
        if place == 0 {
            words.json("-device", &json!({ "driver": self.driver, "id": id }));
        }
        self.taken += 1;
        (id, place)
    }
}

/// The driver of a SCSI controller, and how many disks it takes.
fn scsi(model: ScsiModel) -> Controllers {
    let (driver, places) = match model {
        ScsiModel::Virtio => ("virtio-scsi-pci", VIRTIO_SCSI_PLACES),
        ScsiModel::Lsi => ("lsi53c895a", SCSI_PLACES),
        ScsiModel::LsiSas => ("mptsas1068", SCSI_PLACES),
        ScsiModel::Megasas => ("megasas", SCSI_PLACES),
        ScsiModel::Pvscsi => ("pvscsi", SCSI_PLACES),
    };
    Controllers::new("scsi", driver, places)
}

fn disks(machine: &Machine, words: &mut Words) {
    let mut sata = Controllers::new("sata", "ich9-ahci", SATA_PLACES);
    // All of a machine are of one model.
    let model = machine.disks.iter().find_map(|disk| match disk.bus {
        Bus::Scsi(model) => Some(model),
        _ => None,
    });
    let mut scsi = scsi(model.unwrap_or(ScsiModel::Virtio));
    let mut ide = 0;
    for (nth, disk) in machine.disks.iter().enumerate() {
        let mut attached = match disk.bus {
            Bus::Virtio => json!({ "driver": "virtio-blk-pci" }),
            Bus::Sata => {
                let (controller, place) = sata.place(words);
                json!({ "driver": "ide-hd", "bus": format!("{controller}.{place}") })
            }
            Bus::Scsi(_) => {
                let (controller, place) = scsi.place(words);
                json!({ "driver": "scsi-hd", "bus": format!("{controller}.0"), "scsi-id": place, "lun": 0 })
            }
            Bus::Ide => {
                ide += 1;
                json!({ "driver": "ide-hd", "bus": format!("ide.{}", (ide - 1) / 2), "unit": (ide - 1) % 2 })
            }
        };
        attached["id"] = device(nth).into();
        attached["drive"] = node(nth).into();
        attached["bootindex"] = disk.boot_index.into();
        // An export that is gone, and an overlay that is full, pause the guest: it goes on as if nothing had been.
        attached["werror"] = "stop".into();
        attached["rerror"] = "stop".into();
        if let Some(serial) = &disk.serial {
            attached["serial"] = serial.as_str().into();
        }
        words.json("-device", &attached);
    }
    debug_assert!(ide == 0 || machine.chipset == Chipset::Pc);
}

fn network(setup: &Setup<'_>, words: &mut Words) {
    let backend = match setup.network {
        Network::None => {
            words.add("-nic", "none");
            return;
        }
        Network::User { restricted } => {
            let mut backend = format!("user,id=net0,restrict={}", if *restricted { "on" } else { "off" });
            for forward in setup.forwards {
                backend.push_str(&format!(
                    ",hostfwd=tcp:{}:{}-:{}",
                    forward.host.ip(),
                    forward.host.port(),
                    forward.guest
                ));
            }
            backend
        }
        Network::Bridge(name) => format!("bridge,id=net0,br={name}"),
        Network::Tap(name) => format!("tap,id=net0,ifname={name},script=no,downscript=no"),
    };
    words.add("-netdev", backend);
    let mut nic = json!({ "driver": setup.machine.nic.model, "id": "nic0", "netdev": "net0" });
    if let Some([a, b, c, d, e, f]) = setup.machine.nic.mac {
        nic["mac"] = format!("{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{f:02x}").into();
    }
    words.json("-device", &nic);
}

/// The same for a shell.
pub fn quoted(words: &[OsString]) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_./=:,@%+".contains(c);
    let quote = |word: &OsString| {
        let word = word.to_string_lossy();
        match !word.is_empty() && word.chars().all(plain) {
            true => word.into_owned(),
            false => format!("'{}'", word.replace('\'', r"'\''")),
        }
    };
    words.iter().map(quote).collect::<Vec<_>>().join(" ")
}
