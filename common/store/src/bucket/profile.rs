//! The files in which AWS and those who are like it keep profiles: `~/.aws/config` and `~/.aws/credentials`.
//!
//! Source of the format: AWS SDKs and Tools Reference Guide, "Shared config and credentials files". Sections are `[NAME]` in the
//! credentials and `[profile NAME]` or `[default]` in the configuration; what is indented belongs to the line before.

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};

use super::open::Variables;

/// Longest file that is read.
const MAX_FILE: u64 = 1 << 20;

/// The variables that say where the files are, and which profile is meant.
pub(super) const FILES: [&str; 2] = ["AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"];
pub(super) const NAME: &str = "AWS_PROFILE";

/// Ways to come by keys that take a program, a browser or another service's answer.
const FOREIGN: [&str; 7] = [
    "role_arn",
    "source_profile",
    "sso_session",
    "sso_start_url",
    "credential_process",
    "web_identity_token_file",
    "login_session",
];

/// What a profile says, by its lower-case names; nested ones as `s3.addressing_style`.
pub(super) type Profile = BTreeMap<String, String>;

/// The profile that an environment names, or the default one. That there is none is an error only where one was named.
pub(super) fn named(variables: &Variables) -> io::Result<Profile> {
    let variable = |name: &str| variables.get(name).cloned();
    let named = variable(NAME).or_else(|| variable("AWS_DEFAULT_PROFILE"));
    let name = named.as_deref().unwrap_or("default");
    let file = |name: &str, below_home: &str| -> Option<PathBuf> {
        variable(name).map(PathBuf::from).or_else(|| Some(Path::new(&variable("HOME")?).join(below_home)))
    };
    let mut found = None;
    let section = if name == "default" { name.to_owned() } else { format!("profile {name}") };
    let files = [(file(FILES[0], ".aws/config"), section.as_str()), (file(FILES[1], ".aws/credentials"), name)];
    for (path, section) in files {
        let Some(path) = path else { continue };
        let text = match read(&path) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => continue,
            other => other.map_err(|e| io::Error::new(e.kind(), format!("{}: {e}", path.display())))?,
        };
        if let Some(profile) = of_text(&text, section) {
            found.get_or_insert_with(Profile::new).extend(profile);
        }
    }
    match (found, named) {
        (Some(profile), _) => Ok(profile),
        (None, None) => Ok(Profile::new()),
        (None, Some(name)) => {
            let what = format!(
                "the profile {name:?} is in neither of AWS's files (~/.aws/config and ~/.aws/credentials, or what {} say)",
                FILES.join(" and ")
            );
            Err(io::Error::new(io::ErrorKind::InvalidInput, what))
        }
    }
}

/// Refuses a profile without keys that has another way to come by some: asked without keys, the store would only say no.
pub(super) fn check(profile: &Profile) -> io::Result<()> {
    let has_keys = profile.contains_key("aws_access_key_id");
    match FOREIGN.iter().find(|name| !has_keys && profile.contains_key(**name)) {
        None => Ok(()),
        Some(name) => {
            let what = format!(
                "the profile gets its keys by {name}, which reseal does not do; have `aws configure export-credentials --format env` do it, or name a profile with \
                 aws_access_key_id and aws_secret_access_key"
            );
            Err(io::Error::new(io::ErrorKind::InvalidInput, what))
        }
    }
}

fn read(path: &Path) -> io::Result<String> {
    use std::io::Read;
    let mut text = String::new();
    let read = std::fs::File::open(path)?.take(MAX_FILE + 1).read_to_string(&mut text)?;
    match read as u64 > MAX_FILE {
        true => Err(io::Error::new(io::ErrorKind::InvalidData, "too long for a file of profiles")),
        false => Ok(text),
    }
}

fn of_text(text: &str, section: &str) -> Option<Profile> {
    let mut found: Option<Profile> = None;
    let mut is_inside = false;
    let mut group = String::new();
    for line in text.lines() {
        let content = line.trim();
        if content.is_empty() || content.starts_with(['#', ';']) {
            continue;
        }
        if let Some(name) = content.strip_prefix('[').and_then(|rest| rest.split_once(']')).map(|(name, _)| name) {
            is_inside = name.split_whitespace().eq(section.split_whitespace());
            if is_inside {
                found.get_or_insert_with(Profile::new);
            }
            continue;
        }
        let (true, Some((name, value))) = (is_inside, content.split_once('=')) else { continue };
        let (name, value) = (name.trim().to_ascii_lowercase(), without_comment(value));
        let is_nested = line.starts_with([' ', '\t']);
        if !is_nested {
            group = if value.is_empty() { name.clone() } else { String::new() };
        }
        let name = if is_nested && !group.is_empty() { format!("{group}.{name}") } else { name };
        if let Some(profile) = &mut found {
            profile.insert(name, value.to_owned());
        }
    }
    found
}

/// A value ends where a comment begins, which stands behind a space.
fn without_comment(value: &str) -> &str {
    let end = [" #", " ;", "\t#", "\t;"].iter().filter_map(|mark| value.find(mark)).min();
    value[..end.unwrap_or(value.len())].trim()
}

#[cfg(test)]
mod tests {
    use super::*;

    const CONFIG: &str = "# mine\n[default]\nregion=eu-central-1\n[profile  backup]\nregion = us-east-1 # near\ns3 =\n  addressing_style = path\n\
                          \tmax_queue_size = 10\nendpoint_url = https://s3.example.org\noutput\n[profile other]\nregion = x\n";

    #[test]
    fn sections_nested_values_and_comments_are_read() {
        let of = |section| of_text(CONFIG, section);
        let backup = of("profile backup").unwrap();
        let get = |name: &str| backup.get(name).map(String::as_str);
        assert_eq!(get("region"), Some("us-east-1"));
        assert_eq!(get("s3.addressing_style"), Some("path"));
        assert_eq!(get("endpoint_url"), Some("https://s3.example.org"));
        assert_eq!(of("default").unwrap()["region"], "eu-central-1");
        assert_eq!(of("profile none"), None);
        assert_eq!(of_text("[x]", "x"), Some(Profile::new()));
    }

    #[test]
    fn no_text_is_too_strange() {
        for text in ["", "[", "]", "[]", "=", "[x]\n=\n", "[x]\n = \n\u{0}=\u{0}", "[x]\n  a = b"] {
            of_text(text, "x");
        }
        assert_eq!(of_text("[x]\n  a = b", "x").unwrap()["a"], "b", "nested in nothing");
    }
}
