//! From a definition to a machine and to QEMU's command line: what is taken, what is bounded, and that nothing else gets through.
#![allow(clippy::unwrap_used)] // helpers of tests end where they meet what they did not expect

use std::ffi::OsString;
use std::time::Duration;

use reseal_format::ids::{PointId, VmId};
use reseal_format::manifest::{Definition, Disk, Manifest, Stats};
use reseal_format::names::{DiskName, VmName};
use reseal_format::time::Timestamp;
use reseal_mountfs::boot::{
    Accel, Arch, BootError, Bus, Chipset, Console, Described, Firmware, FirmwareFiles, Forward, Host, HostSize,
    Machine, Network, Overrides, RunFolder, ScsiModel, Setup, command, quoted,
};
use serde_json::{Value, json};

const GIB: u64 = 1 << 30;
const HOST: HostSize = HostSize { arch: Arch::X86_64, memory: 16 * GIB, cpus: 8 };

fn point(disks: &[&str], definition: Option<&str>) -> Manifest {
    let disk = |name: &&str| Disk {
        name: DiskName::new(name).unwrap(),
        length: 1 << 20,
        root: None,
        used_clusters: 0,
        source: String::new(),
        tracking: None,
        claim: None,
    };
    Manifest {
        vm: VmName::new("web,01").unwrap(),
        vm_id: VmId::from_bytes([1; 16]),
        number: 7,
        point_id: PointId::from_bytes([2; 16]),
        created: Timestamp(1),
        parent: None,
        disks: disks.iter().map(disk).collect(),
        definition: definition.map(|text| Definition { file_name: "x".into(), text: text.into() }),
        stats: Stats { read: 0, changed: 0, new: 0, stored: 0, duration_ms: 0 },
        warnings: vec![],
        locked: None,
    }
}

fn machine_of(point: &Manifest, overrides: &Overrides) -> Result<(Machine, Vec<String>), BootError> {
    let described = point.definition.as_ref().and_then(Described::of);
    Machine::of(point, described.as_ref(), overrides, &HOST)
}

fn machine(disks: &[&str], definition: Option<&str>) -> (Machine, Vec<String>) {
    machine_of(&point(disks, definition), &Overrides::default()).unwrap()
}

const DOMAIN: &str = "<?xml version='1.0'?>
<domain type='kvm' id='3'>
  <name>web01</name><uuid>9C1E4A6E-7f0d-4f3f-8d55-0e6f2b9fa4c4</uuid>
  <memory unit='GiB'>4</memory><currentMemory unit='KiB'>1048576</currentMemory>
  <vcpu placement='static' current='3'>6</vcpu>
  <os firmware='efi'><type arch='x86_64' machine='pc-q35-7.2'>hvm</type>
    <loader readonly='yes' type='pflash'>/etc/shadow</loader><nvram>/etc/passwd</nvram>
    <kernel>/boot/vmlinuz</kernel><cmdline>init=/bin/sh</cmdline><boot dev='hd'/></os>
  <clock offset='localtime'/>
  <devices>
    <emulator>/tmp/evil</emulator>
    <disk type='file' device='disk'><source file='/a,b'/><target dev='vda' bus='virtio'/><boot order='2'/></disk>
    <disk type='file' device='cdrom'><target dev='sdz' bus='sata'/></disk>
    <disk type='file' device='disk'><target dev='sda' bus='sata'/><boot order='1'/><serial>WD-123</serial></disk>
    <disk type='file' device='disk'><target dev='sdb' bus='scsi'/><serial>a,b=c</serial></disk>
    <disk type='file' device='disk'><target dev='sdc' bus='usb'/></disk>
    <controller type='scsi' index='0' model='lsilogic'/>
    <interface type='network'><mac address='52:54:00:aa:BB:01'/><model type='e1000e'/><source network='prodnet'/></interface>
    <interface type='bridge'><mac address='52:54:00:aa:bb:02'/></interface>
    <hostdev mode='subsystem' type='pci'><source><address bus='0x06'/></source></hostdev>
  </devices>
</domain>";

#[test]
fn a_libvirt_domain_says_what_the_machine_is() {
    let (machine, warnings) = machine(&["vda", "sda", "sdb", "sdc"], Some(DOMAIN));
    assert_eq!((machine.arch, machine.chipset, machine.firmware), (Arch::X86_64, Chipset::Q35, Firmware::Uefi));
    assert_eq!((machine.memory, machine.cpus, machine.local_time), (4 * GIB, 3, true));
    assert_eq!(machine.uuid.as_deref(), Some("9c1e4a6e-7f0d-4f3f-8d55-0e6f2b9fa4c4"));
    let disks: Vec<_> = machine.disks.iter().map(|d| (d.bus, d.boot_index, d.serial.as_deref())).collect();
    assert_eq!(
        disks,
        [
            (Bus::Virtio, 2, None),
            (Bus::Sata, 1, Some("WD-123")),
            (Bus::Scsi(ScsiModel::Lsi), 3, None),
            (Bus::Sata, 4, None)
        ]
    );
    assert_eq!((machine.nic.model, machine.nic.mac), ("e1000e", Some([0x52, 0x54, 0, 0xaa, 0xbb, 1])));
    assert_eq!(warnings.len(), 2, "{warnings:?}");
    assert!(warnings[0].contains("bus") && warnings[1].contains("2 network adapters"), "{warnings:?}");
}

#[test]
fn a_machine_captured_over_qmp_says_what_it_is() {
    let record = json!({
        "version": 1, "qemu": "7.2.0", "uuid": null, "machine": "pc-i440fx-7.2", "target": "x86_64", "kvm": false,
        "memory": { "base": 2 * GIB, "plugged": GIB }, "cpus": { "count": 2, "model": "host", "topology": null },
        "firmware": { "kind": "bios", "image": "/x", "flash": [] },
        "disks": [
            { "id": "system", "name": "root", "interface": "ide", "device": "ide-hd", "boot-index": null, "read-only": false },
            { "id": "cd", "name": null, "interface": "ide", "device": "ide-cd", "read-only": true },
            { "id": "data", "name": null, "interface": "scsi", "device": "scsi-hd", "boot-index": 1, "read-only": false },
        ],
        "nics": [{ "model": "virtio-net-pci", "mac": "52:54:00:12:34:56" }],
    });
    let (machine, warnings) = machine(&["root", "data"], Some(&record.to_string()));
    assert_eq!((machine.chipset, machine.firmware), (Chipset::Pc, Firmware::Bios));
    assert_eq!((machine.memory, machine.cpus), (3 * GIB, 2));
    let disks: Vec<_> = machine.disks.iter().map(|d| (d.bus, d.boot_index)).collect();
    assert_eq!(disks, [(Bus::Ide, 2), (Bus::Scsi(ScsiModel::Virtio), 1)]);
    assert_eq!(machine.nic.model, "virtio-net-pci");
    assert_eq!(warnings, Vec::<String>::new());
}

#[test]
fn without_a_definition_there_is_a_machine_and_a_warning() {
    for definition in
        [None, Some(""), Some("config: 1"), Some("{}"), Some("<vm/>"), Some("<domain>"), Some("{\"version\":2}")]
    {
        let (machine, warnings) = machine(&["root", "data"], definition);
        assert_eq!((machine.chipset, machine.firmware), (Chipset::Q35, Firmware::Bios), "{definition:?}");
        assert_eq!((machine.memory, machine.cpus), (GIB, 2));
        assert!(machine.disks.iter().all(|disk| disk.bus == Bus::Virtio));
        assert_eq!(machine.disks.iter().map(|disk| disk.boot_index).collect::<Vec<_>>(), [1, 2]);
        assert_eq!(warnings.len(), 1, "{warnings:?}");
    }
}

#[test]
fn what_the_operator_says_goes_before_what_was_captured() {
    let overrides =
        Overrides { memory: Some(512 << 20), cpus: Some(40), firmware: Some(Firmware::Bios), bus: Some(Bus::Virtio) };
    let (machine, warnings) = machine_of(&point(&["vda", "sda"], Some(DOMAIN)), &overrides).unwrap();
    assert_eq!((machine.memory, machine.cpus, machine.firmware), (512 << 20, 40, Firmware::Bios));
    assert!(machine.disks.iter().all(|disk| disk.bus == Bus::Virtio));
    assert_eq!(warnings.len(), 1, "{warnings:?}");
    let little = Overrides { memory: Some(1 << 20), ..Overrides::default() };
    assert!(machine_of(&point(&["vda"], None), &little).is_err());
}

#[test]
fn no_more_is_given_than_this_machine_has() {
    let huge = "<domain><memory unit='TiB'>9</memory><vcpu>4000</vcpu></domain>";
    let (machine, warnings) = machine(&["vda"], Some(huge));
    assert_eq!((machine.memory, machine.cpus), (8 * GIB, 8));
    assert_eq!(warnings.len(), 2, "{warnings:?}");
    let too_much = "<domain><memory unit='TiB'>99999999999999</memory><vcpu>-1</vcpu></domain>";
    let (machine, _) = self::machine(&["vda"], Some(too_much));
    assert_eq!((machine.memory, machine.cpus), (GIB, 2));
}

#[test]
fn disks_that_have_no_places_are_moved_or_refused() {
    let names: Vec<String> = (0..6).map(|nth| format!("d{nth}")).collect();
    let names: Vec<&str> = names.iter().map(String::as_str).collect();
    let ide = Overrides { bus: Some(Bus::Ide), ..Overrides::default() };
    let (machine, warnings) = machine_of(&point(&names, None), &ide).unwrap();
    assert_eq!(machine.chipset, Chipset::Pc);
    assert_eq!(machine.disks.iter().filter(|disk| disk.bus == Bus::Ide).count(), 4);
    assert_eq!(warnings.len(), 3, "{warnings:?}");
    let many: Vec<String> = (0..30).map(|nth| format!("d{nth}")).collect();
    let many: Vec<&str> = many.iter().map(String::as_str).collect();
    let refused = machine_of(&point(&many, None), &Overrides::default()).unwrap_err();
    assert!(refused.to_string().contains("--bus scsi"), "{refused}");
    let scsi = Overrides { bus: Some(Bus::Scsi(ScsiModel::Virtio)), ..Overrides::default() };
    assert_eq!(machine_of(&point(&many, None), &scsi).unwrap().0.disks.len(), 30);
}

#[test]
fn other_names_count_by_their_order_and_other_numbers_of_disks_not_at_all() {
    let domain = "<domain><devices><disk><target dev='vda' bus='sata'/></disk><disk><target dev='vdb' bus='scsi'/></disk></devices>\
                  </domain>";
    let (by_order, warnings) = machine(&["root", "data"], Some(domain));
    assert_eq!(by_order.disks[0].bus, Bus::Sata);
    assert_eq!(by_order.disks[1].bus, Bus::Scsi(ScsiModel::Virtio));
    assert!(warnings.is_empty(), "{warnings:?}");
    let (alone, warnings) = machine(&["root"], Some(domain));
    assert_eq!(alone.disks[0].bus, Bus::Virtio);
    assert!(warnings[0].contains("other disks"), "{warnings:?}");
}

#[test]
fn an_architecture_that_nothing_here_can_be_is_refused() {
    let refused = machine_of(
        &point(&["vda"], Some("<domain><os><type arch='s390x' machine='s390-ccw'>hvm</type></os></domain>")),
        &Overrides::default(),
    );
    assert!(refused.unwrap_err().to_string().contains("s390x"));
    let (machine, _) =
        machine(&["vda"], Some("<domain><os><type arch='aarch64' machine='virt-7.2'>hvm</type></os></domain>"));
    assert_eq!((machine.arch, machine.chipset, machine.firmware), (Arch::Aarch64, Chipset::Virt, Firmware::Uefi));
}

fn words(machine: &Machine, network: &Network, forwards: &[Forward], console: &Console) -> Vec<String> {
    let uefi = FirmwareFiles { code: "/fw/a,b.fd".into(), variables: "/fw/vars.fd".into() };
    let host = Host {
        qemu: "/usr/bin/qemu".into(),
        accel: Accel::Tcg,
        firmware: (machine.firmware == Firmware::Uefi).then_some(uefi),
    };
    let setup = Setup {
        machine,
        host: &host,
        folder: &RunFolder::at("/run/x,y"),
        network,
        forwards,
        console,
        reconnect: Duration::from_secs(10),
        lock_memory: false,
        paused: false,
        extra: &[OsString::from("-snapshot")],
    };
    command(&setup).unwrap().into_iter().map(|word| word.into_string().unwrap()).collect()
}

/// The values of an option.
fn values<'a>(words: &'a [String], option: &str) -> Vec<&'a str> {
    words.windows(2).filter(|pair| pair[0] == option).map(|pair| pair[1].as_str()).collect()
}

#[test]
fn the_command_is_this() {
    let (machine, _) = machine(&["disk-0"], None);
    let expected = "/usr/bin/qemu -name guest=web,,01 -nodefaults -no-user-config -machine q35,dump-guest-core=off \
        -accel tcg,thread=multi -cpu max -smp cpus=2,sockets=1,cores=2,threads=1 -m size=1024M -rtc base=utc \
        -sandbox on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny -pidfile /run/x,y/qemu.pid \
        -chardev socket,id=qmp,server=on,wait=off,path=/run/x,,y/qmp.sock -mon chardev=qmp,mode=control \
        -chardev socket,id=qmp-promote,server=on,wait=off,path=/run/x,,y/qmp-promote.sock -mon chardev=qmp-promote,mode=control \
        -monitor none -device '{\"driver\":\"virtio-serial-pci\",\"id\":\"channels\"}' \
        -chardev socket,id=agent,server=on,wait=off,path=/run/x,,y/agent.sock \
        -device '{\"bus\":\"channels.0\",\"chardev\":\"agent\",\"driver\":\"virtserialport\",\"name\":\"org.qemu.guest_agent.0\"}' \
        -chardev socket,id=console,server=on,wait=off,path=/run/x,,y/console.sock -serial chardev:console \
        -device '{\"driver\":\"VGA\",\"id\":\"screen\"}' -display none \
        -blockdev '{\"detect-zeroes\":\"unmap\",\"discard\":\"unmap\",\"driver\":\"nbd\",\"export\":\"web,01@7/disk-0\",\
        \"node-name\":\"disk-0\",\"reconnect-delay\":10,\"server\":{\"path\":\"/run/x,y/nbd.sock\",\"type\":\"unix\"}}' \
        -device '{\"bootindex\":1,\"drive\":\"disk-0\",\"driver\":\"virtio-blk-pci\",\"id\":\"reseal-disk-0\",\"rerror\":\"stop\",\
        \"werror\":\"stop\"}' -nic none -snapshot";
    let words: Vec<OsString> =
        words(&machine, &Network::None, &[], &Console::Socket).into_iter().map(OsString::from).collect();
    assert_eq!(quoted(&words), expected);
}

#[test]
fn every_disk_is_on_its_bus_and_pauses_the_guest_on_errors() {
    let (machine, _) = machine(&["vda", "sda", "sdb", "sdc"], Some(DOMAIN));
    let words = words(&machine, &Network::None, &[], &Console::None);
    let devices: Vec<Value> =
        values(&words, "-device").iter().map(|text| serde_json::from_str(text).unwrap()).collect();
    let disks: Vec<&Value> = devices.iter().filter(|device| device["drive"].is_string()).collect();
    let drivers: Vec<_> = disks.iter().map(|disk| disk["driver"].as_str().unwrap()).collect();
    assert_eq!(drivers, ["virtio-blk-pci", "ide-hd", "scsi-hd", "ide-hd"]);
    for (nth, disk) in disks.iter().enumerate() {
        assert_eq!((&disk["werror"], &disk["rerror"]), (&json!("stop"), &json!("stop")));
        assert_eq!(
            (&disk["id"], &disk["drive"]),
            (&json!(format!("reseal-disk-{nth}")), &json!(format!("disk-{nth}")))
        );
    }
    assert_eq!((&disks[1]["bus"], &disks[3]["bus"]), (&json!("sata0.0"), &json!("sata0.1")));
    assert!(devices.iter().any(|device| device["driver"] == "lsi53c895a" && device["id"] == "scsi0"));
    assert_eq!(values(&words, "-serial"), ["none"]);
    let flash = values(&words, "-blockdev")[0];
    assert_eq!(serde_json::from_str::<Value>(flash).unwrap()["file"]["filename"], "/fw/a,b.fd");
    assert!(values(&words, "-machine")[0].ends_with("pflash0=firmware,pflash1=firmware-variables"));
}

#[test]
fn nothing_of_a_definition_reaches_the_command_but_what_is_known() {
    let (machine, _) = machine(&["vda", "sda", "sdb", "sdc"], Some(DOMAIN));
    let words = words(&machine, &Network::User { restricted: true }, &[], &Console::Socket).join("\n");
    for hostile in
        ["/etc/shadow", "/etc/passwd", "vmlinuz", "/bin/sh", "/tmp/evil", "a,b=c", "/a,b\"", "0x06", "prodnet"]
    {
        assert!(!words.contains(hostile), "{hostile}");
    }
    // Elements in elements, entities, and what is no XML: refused, without taking the stack or the memory.
    let deep = format!("<domain>{}{}</domain>", "<a>".repeat(50_000), "</a>".repeat(50_000));
    let many = format!("<domain>{}</domain>", "<a/>".repeat(400_000));
    let bomb =
        "<!DOCTYPE d [<!ENTITY a 'aaaaaaaaaa'><!ENTITY b '&a;&a;&a;&a;'>]><domain><name>&b;</name></domain>".to_owned();
    let json = format!("{{\"version\":1,\"disks\":{}{}}}", "[".repeat(100_000), "]".repeat(100_000));
    for text in [many, bomb, json] {
        assert_eq!(Described::of(&Definition { file_name: "x".into(), text }), None);
    }
    let _ = Described::of(&Definition { file_name: "x".into(), text: deep });
    for mac in ["", "01:00:5e:00:00:01", "52:54:00:12:34", "52:54:00:12:34:567", "52:54:00:12:34:5,"] {
        let xml = format!("<domain><devices><interface><mac address='{mac}'/></interface></devices></domain>");
        assert_eq!(self::machine(&["vda"], Some(&xml)).0.nic.mac, None, "{mac}");
    }
}

#[test]
fn a_guest_has_the_network_that_was_asked_for() {
    let (machine, _) = machine(&["vda"], Some(DOMAIN));
    let forwards = [Forward::parse("2222:22").unwrap()];
    let net = |network, forwards: &[Forward]| {
        let words = words(&machine, &network, forwards, &Console::None);
        values(&words, "-netdev").first().map(|value| (*value).to_owned())
    };
    assert_eq!(net(Network::None, &[]), None);
    assert_eq!(
        net(Network::User { restricted: true }, &forwards).unwrap(),
        "user,id=net0,restrict=on,hostfwd=tcp:127.0.0.1:2222-:22"
    );
    assert_eq!(net(Network::User { restricted: false }, &[]).unwrap(), "user,id=net0,restrict=off");
    assert_eq!(net(Network::Bridge("br0".into()), &[]).unwrap(), "bridge,id=net0,br=br0");
    assert_eq!(net(Network::Tap("tap0".into()), &[]).unwrap(), "tap,id=net0,ifname=tap0,script=no,downscript=no");
}
