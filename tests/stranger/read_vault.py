#!/usr/bin/env python3
"""Reads a vault as docs/FORMAT.md describes it, and prints what it holds as JSON.

    read_vault.py VAULT KEYRING TENANT

Written from that document alone, in another language and with other libraries than reseal, so that the document is
known to suffice. Where this program and reseal disagree, one of the three is wrong.
"""

import hashlib
import json
import re
import struct
import sys
from pathlib import Path
from urllib.parse import unquote_to_bytes

import blake3
import zstandard
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

CLUSTER = 65536
FANOUT = 1024
TAG = 16
HOLE = 0xFFFFFFFF
DATA_PACK, INDEX_PACK, MANIFEST, TOMBSTONE, NOTE, RECORD = range(1, 7)
LENGTHS_ORDINAL, IDS_ORDINAL = 0xFFFFFFFF, 0xFFFFFFFE
MAX_WHOLE = 128 << 20


class Damage(Exception):
    pass


def demand(condition, what):
    if not condition:
        raise Damage(what)


def identifier(text):
    demand(re.fullmatch("[0-9a-f]{32}", text), f"no identifier: {text}")
    return bytes.fromhex(text)


def digest(text):
    demand(re.fullmatch("[0-9a-f]{64}", text), f"no digest: {text}")
    return bytes.fromhex(text)


def encode_name(name):
    keep = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_."
    text = "".join(chr(b) if b in keep else f"%{b:02X}" for b in name.encode())
    return "%2E" + text[1:] if text.startswith(".") else text


def decode_name(key):
    """The name, or None for what is no key of a name."""
    try:
        name = unquote_to_bytes(key).decode()
    except UnicodeDecodeError:
        return None
    legal = 1 <= len(name.encode()) <= 80 and name not in (".", "..") and "/" not in name
    return name if legal and encode_name(name) == key else None


def nonce(ordinal):
    return bytes(8) + struct.pack(">I", ordinal)


def open_sealed(key, ordinal, aad, sealed, what):
    try:
        return AESGCM(key).decrypt(nonce(ordinal), sealed, aad)
    except Exception:
        raise Damage(f"{what} fails authentication") from None


def parts(*values):
    return b"".join(struct.pack("<Q", len(value)) + value for value in values)


def unwrap_with_keyring(path, name, context, wrapped):
    """The keyring file, in clear."""
    keyring = json.loads(path.read_bytes())
    demand(keyring["format"] == "reseal-keyring" and keyring["version"] == 1, "keyring")
    for entry in keyring["keys"]:
        kek = digest(entry["key"])
        label = parts(b"reseal kms v1 key check", entry["name"].encode(), struct.pack("<Q", entry["created"]))
        demand(hashlib.sha256(label + kek).digest()[:8].hex() == entry["check"], "check value in the keyring")
        if entry["name"] == name:
            demand(wrapped[0] == 1, "version of the wrapped payload")
            aad = parts(b"reseal kms v1 wrapped payload", name.encode(), context)
            return AESGCM(kek).decrypt(wrapped[1:13], wrapped[13:], aad)
    raise Damage(f"the keyring has no key {name}")


class Vault:
    def __init__(self, folder, keyring, tenant):
        self.folder = folder / "tenants" / encode_name(tenant)
        self.packs = {}
        record = json.loads((folder / "reseal.json").read_bytes())
        demand(record["what"] == "reseal vault" and record["format"] == 1, "reseal.json")
        demand(not record.get("required_features", []), "features of the vault")
        self.unlock(identifier(record["vault_id"]), keyring, tenant)

    def unlock(self, vault, keyring, tenant):
        record = json.loads((self.folder / "tenant.json").read_bytes())
        demand(record["format"] == 1 and record["kms"]["kind"] == "keyring", "tenant.json")
        tenant_id = identifier(record["tenant_id"])
        self.scope = vault + tenant_id
        generation = struct.pack("<Q", record["generation"])
        context = b"reseal/1 master" + self.scope
        payload = unwrap_with_keyring(keyring, record["kms"]["key"], context, bytes.fromhex(record["wrapped"]))
        demand(len(payload) == 80, "length of the payload")
        demand(payload[:48] == b"RSLMASTR" + self.scope + generation, "the payload is of something else")
        key = self.derive(payload[48:], bytes.fromhex(record["salt"]), RECORD, tenant_id)
        aad = struct.pack("<H", 1) + self.scope + generation
        secrets = json.loads(open_sealed(key, 0, aad, bytes.fromhex(record["sealed"]), "tenant.json"))
        demand(secrets["tenant"] == tenant, "the record is another tenant's")
        demand(not secrets.get("required_features", []), "features of the tenant")
        self.deks = {dek["epoch"]: digest(dek["key"]) for dek in secrets["deks"]}
        self.dedup = digest(secrets["dedup"])

    def derive(self, secret, salt, kind, id):
        info = b"reseal/1 object key" + self.scope + bytes([kind]) + id
        return HKDF(algorithm=SHA256(), length=32, salt=salt, info=info).derive(secret)

    def blob_id(self, plaintext):
        return blake3.blake3(blake3.blake3(plaintext).digest(), key=self.dedup).digest()

    def open_object(self, path, kind):
        """Header and plaintext of a manifest, tombstone or note."""
        data = path.read_bytes()
        demand(len(data) >= 128 + TAG and data[:8] == b"RSLSEAL1", f"{path} is no sealed object")
        (version, found, _reserved, epoch, id, salt, vm, number, generation, parent, length) = struct.unpack(
            "<HBBI16s32s16sIQ32sI", data[8:128]
        )
        demand(version == 1 and found == kind and len(data) == 128 + length + TAG, f"header of {path}")
        key = self.derive(self.deks[epoch], salt, kind, id)
        plain = open_sealed(key, 0, struct.pack("<H", 1) + self.scope + data[:128], data[128:], path)
        content = json.loads(plain)
        demand(not content.get("required_features", []), f"features of {path}")
        demand((vm, number) == (identifier(content["vm_id"]), content["number"]), f"{path} contradicts itself")
        own = identifier(content["note_id"] if kind == NOTE else content["point_id"])
        known = content.get("parent") if kind != NOTE else None
        demand((id, parent) == (own, digest(known["digest"]) if known else bytes(32)), f"{path} contradicts itself")
        return content, plain

    def point_files(self, vm):
        """The numbers of a VM, as {number: whether it is forgotten}."""
        states = {}
        for path in sorted((self.folder / "vms" / encode_name(vm)).iterdir()):
            match = re.fullmatch(r"(\d{8})\.(manifest|forgotten)", path.name)
            if match and int(match[1]) > 0:
                states[int(match[1])] = states.get(int(match[1]), False) or match[2] == "forgotten"
        demand(sorted(states) == list(range(1, len(states) + 1)), f"{vm} has gaps")
        return states

    def vms(self):
        names = (decode_name(path.name) for path in (self.folder / "vms").iterdir())
        return sorted(name for name in names if name is not None)

    def pack(self, id, generation):
        if id not in self.packs:
            try:
                self.packs[id] = Pack(self, id, generation)
            except (Damage, OSError):
                self.packs[id] = Pack(self, id, self.newest_generation(id))
        return self.packs[id]

    def newest_generation(self, id):
        generations = []
        for path in (self.folder / "packs" / id.hex()[:2]).iterdir():
            match = re.fullmatch(re.escape(id.hex()) + r"\.(0|[1-9]\d*)", path.name)
            generations += [int(match[1])] if match else []
        demand(generations, f"pack {id.hex()} is missing")
        return max(generations)

    def blob(self, kind, place):
        id, generation, ordinal = place
        pack = self.pack(id, generation)
        demand(pack.kind == kind, f"pack {id.hex()} is of another kind")
        return pack.blob(ordinal)

    def node(self, place, level):
        plain = zstandard.ZstdDecompressor().decompress(self.blob(INDEX_PACK, place)[0], max_output_size=24580)
        demand(self.blob_id(plain) == self.blob(INDEX_PACK, place)[1], "id of an index node")
        found, zero, packs = struct.unpack("<BBH", plain[:4])
        demand((found, zero) == (level, 0) and packs <= FANOUT, "index node")
        demand(len(plain) == 4 + 20 * packs + 4 * FANOUT, "length of an index node")
        table = [struct.unpack_from("<16sI", plain, 4 + 20 * row) for row in range(packs)]
        children = []
        for entry in struct.unpack_from(f"<{FANOUT}I", plain, 4 + 20 * packs):
            if entry == HOLE:
                children.append(None)
                continue
            demand(entry // 16384 < packs, "index entry")
            children.append((*table[entry // 16384], entry % 16384))
        return children

    def clusters(self, place, level, first, count):
        """(index, bytes) of each cluster below a node that is no hole."""
        for slot, child in enumerate(self.node(place, level)):
            below = first + slot * FANOUT**level
            if child is None:
                continue
            demand(below < count, "a cluster past the end of the disk")
            if level > 0:
                yield from self.clusters(child, level - 1, below, count)
            else:
                content, id = self.blob(DATA_PACK, child)
                cluster = decode_frames(content)
                demand(self.blob_id(cluster) == id, "id of a cluster")
                yield below, cluster

    def disk(self, disk):
        length, root = disk["length"], disk["root"]
        count = -(-length // CLUSTER)
        level = next(level for level in range(4) if count <= FANOUT ** (level + 1))
        whole = bytearray(length) if length <= MAX_WHOLE else None
        listed, used = blake3.blake3(), 0
        if root is not None:
            place = (identifier(root["pack"]), root["generation"], root["ordinal"])
            for index, cluster in self.clusters(place, level, 0, count):
                used += 1
                listed.update(struct.pack("<Q", index) + cluster)
                if whole is not None:
                    start, end = index * CLUSTER, min(length, (index + 1) * CLUSTER)
                    whole[start:end] = cluster[: end - start]
        demand(used == disk["used_clusters"], "number of clusters that are used")
        return {
            "name": disk["name"],
            "length": length,
            "whole": None if whole is None else blake3.blake3(bytes(whole)).hexdigest(),
            "clusters": listed.hexdigest(),
        }


class Pack:
    def __init__(self, vault, id, generation):
        path = vault.folder / "packs" / id.hex()[:2] / f"{id.hex()}.{generation}"
        self.vault, self.id, self.data = vault, id, path.read_bytes()
        trailer = self.data[-128:]
        demand(len(trailer) == 128 and trailer[:8] == b"RSLPACK1" and trailer[120:] == b"1KCAPLSR", f"trailer of {path}")
        (version, self.kind, _, self.generation, own, epoch, count, blob_bytes, _, salt, found) = struct.unpack(
            "<HBBI16sIIQQ32s32s", trailer[8:120]
        )
        demand(version == 1 and self.kind in (DATA_PACK, INDEX_PACK), f"trailer of {path}")
        demand((own, self.generation) == (id, generation), f"{path} is another pack")
        demand(blob_bytes + 36 * count + 160 == len(self.data) and count <= 16384, f"length of {path}")
        demand(blake3.blake3(self.data[:-40]).digest() == found, f"digest of {path}")
        self.key = vault.derive(vault.deks[epoch], salt, self.kind, id)
        ids_end = blob_bytes + 32 * count + TAG
        ids = self.open(IDS_ORDINAL, self.data[blob_bytes:ids_end])
        lengths = self.open(LENGTHS_ORDINAL, self.data[ids_end:-128])
        self.ids = [ids[32 * n : 32 * n + 32] for n in range(count)]
        self.lengths = struct.unpack(f"<{count}I", lengths)
        demand(all(n == 0 or 17 <= n <= 65561 for n in self.lengths), f"lengths of {path}")
        demand(sum(self.lengths) == blob_bytes, f"lengths of {path}")

    def open(self, ordinal, sealed):
        aad = struct.pack("<H", 1) + self.vault.scope + bytes([self.kind]) + self.id
        aad += struct.pack("<III", self.generation, ordinal, len(sealed) - TAG)
        return open_sealed(self.key, ordinal, aad, sealed, f"pack {self.id.hex()} ordinal {ordinal}")

    def blob(self, ordinal):
        demand(ordinal < len(self.lengths) and self.lengths[ordinal] > 0, f"no blob {ordinal} in {self.id.hex()}")
        start = sum(self.lengths[:ordinal])
        return self.open(ordinal, self.data[start : start + self.lengths[ordinal]]), self.ids[ordinal]


def decode_frames(content):
    shift = content[0]
    demand(shift in (14, 15, 16), "size of frames")
    size, count = 1 << shift, CLUSTER >> shift
    at, cluster = 1 + 2 * count, b""
    for stored in struct.unpack_from(f"<{count}H", content, 1):
        taken = size if stored == 65535 else stored
        frame = content[at : at + taken]
        at += taken
        if stored == 0:
            frame = bytes(size)
        elif stored != 65535:
            frame = zstandard.ZstdDecompressor().decompress(frame, max_output_size=size)
        demand(len(frame) == size, "length of a frame")
        cluster += frame
    demand(at == len(content), "frames do not end with the blob")
    return cluster


def notes(vault, vm):
    folder = vault.folder / "vms" / encode_name(vm) / "notes"
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        match = re.fullmatch(r"(\d{8})-([0-9a-f]{32})\.note", path.name)
        if match:
            note, _ = vault.open_object(path, NOTE)
            demand((note["vm"], note["number"]) == (vm, int(match[1])), f"{path} is about something else")
            demand(note["note_id"] == match[2], f"{path} is another note")
            yield {key: note[key] for key in ("vm", "number", "note_id", "kind", "content")}


def main(folder, keyring, tenant):
    vault = Vault(Path(folder), Path(keyring), tenant)
    found = {"tenant": tenant, "points": [], "tombstones": [], "notes": []}
    for vm in vault.vms():
        before, vm_id = None, None
        for number, forgotten in sorted(vault.point_files(vm).items()):
            name = f"{number:08}." + ("forgotten" if forgotten else "manifest")
            path = vault.folder / "vms" / encode_name(vm) / name
            content, plain = vault.open_object(path, TOMBSTONE if forgotten else MANIFEST)
            demand((content["vm"], content["number"]) == (vm, number), f"{path} is about something else")
            demand(content.get("parent") == before, f"{path} does not follow the number before it")
            demand(vm_id in (None, content["vm_id"]), f"{path} is of another VM")
            vm_id = content["vm_id"]
            own = content["digest"] if forgotten else blake3.blake3(plain).hexdigest()
            before = {"number": number, "digest": own}
            if forgotten:
                keys = ("vm", "number", "point_id", "digest", "reason")
                found["tombstones"].append({key: content[key] for key in keys})
            else:
                definition = content.get("definition")
                disks = [vault.disk(disk) for disk in content["disks"]]
                text = definition and definition["text"]
                found["points"].append({"vm": vm, "number": number, "definition": text, "disks": disks})
        found["notes"] += notes(vault, vm)
    json.dump(found, sys.stdout, indent=2, ensure_ascii=False)


if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit(__doc__)
    main(*sys.argv[1:])
