//! A server on this machine that answers as a test tells it, in the clear, and keeps what it was sent.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use reseal_kms::Transit;
use reseal_kms::config::{VaultAuth, VaultConfig};
use reseal_kms::transit::{Address, ApiPath};
use tempfile::TempDir;

use super::private_file;

pub(crate) const TOKEN: &str = "s.TokenOfTheScriptedServer";

/// What a test sends back for a request: all of it, pieces with pauses between them, or nothing ever.
pub(crate) enum Reply {
    Whole(String),
    Dripping(String, Duration),
    Never,
}

/// A request: its first line's method and path, all of its text, and which it is, from 0.
pub(crate) struct Request {
    pub(crate) line: String,
    pub(crate) text: String,
    pub(crate) body: String,
    pub(crate) nth: usize,
}

pub(crate) struct Scripted {
    port: u16,
    dir: TempDir,
    seen: Arc<Mutex<Vec<String>>>,
}

/// An answer with a status and a body.
pub(crate) fn http(status: u16, body: &str) -> Reply {
    Reply::Whole(format!("HTTP/1.1 {status} X\r\nContent-Length: {}\r\nConnection: close\r\n\r\n{body}", body.len()))
}

/// A key as a server describes a good one.
pub(crate) const KEY: &str = r#"{"data":{"type":"aes256-gcm96","latest_version":1,"min_decryption_version":1,
    "keys":{"1":1},"exportable":false,"allow_plaintext_backup":false,"derived":false}}"#;

impl Scripted {
    pub(crate) fn start(answer: impl Fn(&Request) -> Reply + Send + Sync + 'static) -> Scripted {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let (seen, answer) = (Arc::new(Mutex::new(Vec::new())), Arc::new(answer));
        let log = seen.clone();
        thread::spawn(move || {
            for (nth, stream) in listener.incoming().enumerate() {
                let (answer, log) = (answer.clone(), log.clone());
                thread::spawn(move || serve(stream.unwrap(), nth, &*answer, &log));
            }
        });
        Scripted { port, dir: tempfile::tempdir().unwrap(), seen }
    }

    /// The first line of each request, without the lookup of the token.
    pub(crate) fn seen(&self) -> Vec<String> {
        self.seen.lock().unwrap().iter().filter(|line| !line.contains("lookup-self")).cloned().collect()
    }

    pub(crate) fn address(&self) -> String {
        format!("http://127.0.0.1:{}", self.port)
    }

    pub(crate) fn config(&self, timeout: Duration) -> VaultConfig {
        VaultConfig {
            address: Address::parse(&self.address()).unwrap(),
            mount: ApiPath::parse("transit").unwrap(),
            ca: None,
            auth: VaultAuth::TokenFile(private_file(&self.dir.path().join("token"), TOKEN)),
            namespace: None,
            timeout,
        }
    }

    pub(crate) fn approle_config(&self, role_id: &str, secret_id: &str) -> VaultConfig {
        let auth = VaultAuth::AppRole {
            role_id_file: private_file(&self.dir.path().join("role-id"), role_id),
            secret_id_file: private_file(&self.dir.path().join("secret-id"), secret_id),
            mount: ApiPath::parse("approle").unwrap(),
        };
        VaultConfig { auth, ..self.config(Duration::from_secs(5)) }
    }

    pub(crate) fn transit(&self, timeout: Duration) -> Transit {
        Transit::new(&self.config(timeout)).unwrap()
    }
}

fn serve(mut stream: TcpStream, nth: usize, answer: &dyn Fn(&Request) -> Reply, log: &Mutex<Vec<String>>) {
    stream.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
    let mut text = Vec::new();
    let mut piece = [0; 4096];
    let whole = |text: &[u8]| {
        let text = String::from_utf8_lossy(text).into_owned();
        let (head, body) = text.split_once("\r\n\r\n")?;
        let len =
            head.lines().find_map(|line| line.to_lowercase().strip_prefix("content-length: ")?.parse::<usize>().ok());
        (body.len() >= len.unwrap_or(0)).then(|| (text.clone(), body.to_owned()))
    };
    let (text, body) = loop {
        match stream.read(&mut piece) {
            Ok(0) | Err(_) => return,
            Ok(len) => text.extend_from_slice(&piece[..len]),
        }
        if let Some(whole) = whole(&text) {
            break whole;
        }
    };
    let line = text.lines().next().unwrap().trim_end_matches(" HTTP/1.1").to_owned();
    log.lock().unwrap().push(line.clone());
    match answer(&Request { line, text, body, nth }) {
        Reply::Whole(bytes) => drop(stream.write_all(bytes.as_bytes())),
        Reply::Dripping(bytes, pause) => {
            for byte in bytes.bytes() {
                if stream.write_all(&[byte]).is_err() {
                    return;
                }
                thread::sleep(pause);
            }
        }
        Reply::Never => thread::sleep(Duration::from_secs(20)),
    }
    let _ = stream.shutdown(Shutdown::Write);
    // What is unread would make the end a reset.
    let _ = stream.read(&mut piece);
}
