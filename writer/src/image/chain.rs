//! What `qemu-img` tells about an image and those that it builds on, and what is refused because of it.

use std::os::unix::fs::FileTypeExt;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use serde::Deserialize;
use serde_json::json;

use super::{ImageError, ImageFormat};
use reseal_qemu::tool::{self, Ended, bind, find};
use reseal_qemu::{Secret, secret};

const QEMU_IMG: &str = "qemu-img";
/// How long a look at the headers may take.
const INFO_LIMIT: Duration = Duration::from_secs(30);
/// How long a check of an image's tables may take: they are some 250 MB of an image of 1 TB.
const CHECK_LIMIT: Duration = Duration::from_secs(600);
/// Where QEMU's programs find a secret.
pub(super) const SECRET_FD: i32 = 4;

/// One image of a chain, as `qemu-img info` describes it.
#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
struct Info {
    format: String,
    #[serde(default)]
    encrypted: bool,
    backing_filename: Option<String>,
    backing_filename_format: Option<String>,
    format_specific: Option<Specific>,
}

#[derive(Deserialize)]
struct Specific {
    #[serde(default)]
    data: Option<Data>,
}

#[derive(Deserialize, Default)]
struct Data {
    #[serde(default)]
    corrupt: bool,
    encrypt: Option<Encrypt>,
}

#[derive(Deserialize)]
struct Encrypt {
    format: String,
}

/// An image and those that it builds on.
pub(super) struct Chain(Vec<Info>);

impl Chain {
    /// The secret if the image needs one.
    pub(super) fn secret<'a>(&self, path: &Path, given: Option<&'a Secret>) -> Result<Option<&'a Secret>, ImageError> {
        let path = || path.display().to_string();
        let Some(top) = self.0.first().filter(|top| top.encrypted || top.format == "luks") else { return Ok(None) };
        let data = top.format_specific.as_ref().and_then(|specific| specific.data.as_ref());
        if let Some(encrypt) = data.and_then(|data| data.encrypt.as_ref()).filter(|encrypt| encrypt.format != "luks") {
            return Err(ImageError::Cipher { path: path(), method: encrypt.format.chars().take(32).collect() });
        }
        given.map(Some).ok_or_else(|| ImageError::NoSecret { path: path() })
    }

    fn refuse(&self, path: &Path) -> Result<(), ImageError> {
        let path = || path.display().to_string();
        let data =
            |info: &Info| info.format_specific.as_ref().and_then(|specific| specific.data.as_ref().map(|d| d.corrupt));
        if self.0.iter().any(|info| data(info) == Some(true)) {
            return Err(ImageError::Corrupt { path: path(), said: "QEMU has marked it as corrupt".into() });
        }
        // Without a recorded format QEMU would go by the content, which a guest wrote while it was a raw disk.
        let guessed = |info: &&Info| info.format == "qcow2" && info.backing_filename_format.is_none();
        match self.0.iter().filter(guessed).find_map(|info| info.backing_filename.as_ref()) {
            Some(backing) => Err(ImageError::Probed { path: path(), backing: backing.clone() }),
            None => Ok(()),
        }
    }
}

/// The image as QEMU is told of it: in JSON, so that no character of a name means anything.
pub(super) fn spec(path: &Path, format: ImageFormat, secret: bool) -> Result<String, ImageError> {
    let shown = || path.display().to_string();
    let failed = |action| move |source| ImageError::Io { path: shown(), action, source };
    let absolute = std::path::absolute(path).map_err(failed("find"))?;
    let name = absolute.to_str().ok_or_else(|| ImageError::Name { path: shown() })?;
    let data = std::fs::metadata(path).map_err(failed("look at"))?;
    let driver = if data.file_type().is_block_device() { "host_device" } else { "file" };
    let mut spec = json!({
        "driver": format.driver(),
        "read-only": true,
        "file": { "driver": driver, "filename": name, "read-only": true },
    });
    match (format, secret) {
        (ImageFormat::Luks, true) => spec["key-secret"] = json!(SECRET_ID),
        (_, true) => spec["encrypt"] = json!({ "format": "luks", "key-secret": SECRET_ID }),
        (_, false) => {}
    }
    Ok(format!("json:{spec}"))
}

const SECRET_ID: &str = "image";

/// Arguments of QEMU's programs that name the secret.
pub(super) fn secret_arguments() -> [String; 2] {
    secret::arguments(SECRET_ID, SECRET_FD)
}

/// Looks at the headers of an image and of all that it builds on.
pub(super) fn inspect(path: &Path, format: ImageFormat) -> Result<Chain, ImageError> {
    let spec = spec(path, format, false)?;
    let arguments = ["info", "--backing-chain", "--output=json", &spec].map(String::from);
    let ended = qemu_img(path, &arguments, None, INFO_LIMIT)?;
    if !ended.status.success() {
        return Err(explain(path, format, QEMU_IMG, &spec, &ended.stderr));
    }
    let chain: Vec<Info> = serde_json::from_str(&ended.stdout).map_err(|e| ImageError::Failed {
        path: path.display().to_string(),
        program: QEMU_IMG,
        said: format!("its description can't be read: {e}"),
    })?;
    let chain = Chain(chain);
    chain.refuse(path)?;
    Ok(chain)
}

/// Checks the tables of an image. QEMU reads what they place beyond the end of a file that was cut off as zeros;
/// without this a torn copy would become a restore point.
pub(super) fn check(path: &Path, format: ImageFormat, spec: &str, secret: Option<&Secret>) -> Result<(), ImageError> {
    if matches!(format, ImageFormat::Raw | ImageFormat::Luks | ImageFormat::Vpc) {
        return Ok(()); // they have no tables that it knows to check
    }
    let mut arguments = vec!["check".to_owned()];
    if secret.is_some() {
        arguments.extend(secret_arguments());
    }
    arguments.push(spec.to_owned());
    let ended = qemu_img(path, &arguments, secret, CHECK_LIMIT)?;
    match ended.status.code() {
        // Leaked clusters waste space and harm nothing; some kinds of VMDK can't be checked.
        Some(0 | 3 | 63) => Ok(()),
        Some(2) => {
            let said: String = ended.stderr.lines().chain(ended.stdout.lines()).take(2).collect::<Vec<_>>().join("\n");
            let path = path.display().to_string();
            Err(ImageError::Corrupt { said: tool::shorten(&said, spec, &path), path })
        }
        _ => Err(explain(path, format, QEMU_IMG, spec, &ended.stderr)),
    }
}

fn qemu_img(path: &Path, arguments: &[String], secret: Option<&Secret>, limit: Duration) -> Result<Ended, ImageError> {
    let failed = |source| ImageError::Io { path: path.display().to_string(), action: "look into", source };
    let mut command = Command::new(find(QEMU_IMG)?);
    command.args(arguments);
    let secret = secret.map(|secret| Ok((secret.pipe()?.into(), SECRET_FD))).transpose().map_err(failed)?;
    bind(&mut command, secret.into_iter().collect()).map_err(failed)?;
    tool::run(command, limit).map_err(failed)?.ok_or_else(|| ImageError::Slow {
        path: path.display().to_string(),
        program: QEMU_IMG,
        seconds: limit.as_secs(),
        said: "it was still reading".into(),
    })
}

/// What QEMU's message about an image means for the administrator.
pub(super) fn explain(path: &Path, format: ImageFormat, program: &'static str, spec: &str, said: &str) -> ImageError {
    let path = path.display().to_string();
    let short = tool::shorten(said, spec, &path);
    let says = |text: &str| said.contains(text);
    if says("lock") && says("another process") {
        ImageError::InUse { path }
    } else if says("Invalid password") {
        ImageError::WrongSecret { path }
    } else if says("key-secret' is required") {
        ImageError::NoSecret { path }
    } else if says("backing file") || names_another(said, spec, &path) {
        ImageError::Backing { path, said: short }
    } else if says("invalid VMDK image descriptor") {
        ImageError::NotThat { path, format }
    } else if says("orrupt") || says("nvalid") {
        ImageError::Corrupt { path, said: short }
    } else {
        ImageError::Failed { path, program, said: short }
    }
}

/// Whether the first file that a message says could not be opened is another than the image itself.
fn names_another(said: &str, spec: &str, path: &str) -> bool {
    let rest = said.split_once("Could not open '").map(|(_, rest)| rest);
    rest.is_some_and(|rest| ![spec, path].iter().any(|own| rest.starts_with(&format!("{own}'"))))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chain(text: &str) -> Chain {
        Chain(serde_json::from_str(text).unwrap())
    }

    #[test]
    fn no_character_of_a_name_means_anything() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a,b=c:d \"e\" \\ 'f'\n{}.qcow2");
        std::fs::write(&path, b"x").unwrap();
        let text = spec(&path, ImageFormat::Qcow2, true).unwrap();
        let spec: serde_json::Value = serde_json::from_str(text.strip_prefix("json:").unwrap()).unwrap();
        assert_eq!(spec["file"]["filename"], path.to_str().unwrap());
        assert_eq!((&spec["driver"], &spec["read-only"]), (&json!("qcow2"), &json!(true)));
    }

    #[test]
    fn what_the_headers_say_is_refused_or_asked_for() {
        let path = Path::new("/d");
        let plain =
            chain(r#"[{"format": "qcow2", "virtual-size": 1, "format-specific": {"type": "qcow2", "data": {}}}]"#);
        plain.refuse(path).unwrap();
        assert!(plain.secret(path, None).unwrap().is_none());
        let probed = chain(r#"[{"format": "qcow2", "backing-filename": "base.raw"}, {"format": "raw"}]"#);
        assert!(matches!(probed.refuse(path), Err(ImageError::Probed { .. })));
        let corrupt = chain(r#"[{"format": "qcow2", "format-specific": {"data": {"corrupt": true}}}]"#);
        assert!(matches!(corrupt.refuse(path), Err(ImageError::Corrupt { .. })));
        let luks =
            r#"[{"format": "qcow2", "encrypted": true, "format-specific": {"data": {"encrypt": {"format": "X"}}}}]"#;
        assert!(matches!(chain(luks).secret(path, None), Err(ImageError::Cipher { .. })));
        assert!(matches!(chain(&luks.replace('X', "luks")).secret(path, None), Err(ImageError::NoSecret { .. })));
        assert!(matches!(chain(r#"[{"format": "luks"}]"#).secret(path, None), Err(ImageError::NoSecret { .. })));
    }
}
