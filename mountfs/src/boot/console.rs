//! Where a guest's console is.

use std::net::SocketAddr;
use std::path::PathBuf;

/// The first port of VNC: display n is at n more.
const VNC: u16 = 5900;

/// The serial console, and the screen.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum Console {
    /// The serial one at a socket in the run folder.
    #[default]
    Socket,
    /// The serial one on this terminal.
    Stdio,
    /// What the serial one says goes to a file.
    File(PathBuf),
    None,
    /// The screen by VNC, and the serial one at a socket.
    Vnc(Vnc),
}

/// Where VNC listens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Vnc {
    Tcp(SocketAddr),
    Unix(PathBuf),
}

impl Console {
    /// Parses what `--console` says.
    pub fn parse(text: &str) -> Result<Console, String> {
        let absolute = |path: &str| std::path::absolute(path).map_err(|e| e.to_string());
        match (text, text.strip_prefix("vnc=")) {
            ("socket", _) => Ok(Console::Socket),
            ("stdio", _) => Ok(Console::Stdio),
            ("none", _) => Ok(Console::None),
            (_, Some(place)) => match place.strip_prefix("unix:") {
                Some(path) => Ok(Console::Vnc(Vnc::Unix(absolute(path)?))),
                None => tcp(place).map(|address| Console::Vnc(Vnc::Tcp(address))),
            },
            (path, None) => absolute(path).map(Console::File),
        }
    }
}

/// `ADDRESS:DISPLAY`, as VNC's clients have it. It is neither encrypted nor protected by a password.
fn tcp(text: &str) -> Result<SocketAddr, String> {
    let wrong = || "VNC listens at ADDRESS:DISPLAY, such as 127.0.0.1:0, or at unix:PATH".to_owned();
    let (host, display) = text.rsplit_once(':').ok_or_else(wrong)?;
    let port = display.parse::<u16>().ok().and_then(|display| display.checked_add(VNC)).ok_or_else(wrong)?;
    let ip = host.trim_matches(['[', ']']).parse().map_err(|_| wrong())?;
    match SocketAddr::new(ip, port) {
        address if address.ip().is_loopback() => Ok(address),
        _ => Err("VNC is in the clear and asks for no password: let it listen at 127.0.0.1 or unix:PATH, and reach that by SSH".into()),
    }
}

impl Vnc {
    /// As QEMU takes it, a comma not yet doubled.
    pub fn display(&self) -> String {
        match self {
            Vnc::Tcp(address) => format!("{}:{}", host(address), address.port() - VNC),
            Vnc::Unix(path) => format!("unix:{}", path.display()),
        }
    }
}

fn host(address: &SocketAddr) -> String {
    match address {
        SocketAddr::V4(address) => address.ip().to_string(),
        SocketAddr::V6(address) => format!("[{}]", address.ip()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_screen_is_shown_to_this_host_only() {
        let Ok(Console::Vnc(vnc)) = Console::parse("vnc=127.0.0.1:1") else { panic!() };
        assert_eq!(vnc, Vnc::Tcp("127.0.0.1:5901".parse().unwrap()));
        assert_eq!(vnc.display(), "127.0.0.1:1");
        let Ok(Console::Vnc(vnc)) = Console::parse("vnc=[::1]:0") else { panic!() };
        assert_eq!(vnc.display(), "[::1]:0");
        assert_eq!(Console::parse("vnc=unix:/run/a"), Ok(Console::Vnc(Vnc::Unix("/run/a".into()))));
        for bad in ["vnc=", "vnc=0.0.0.0:1", "vnc=10.0.0.1:0", "vnc=127.0.0.1:65000", "vnc=127.0.0.1:0,to=9"] {
            assert!(Console::parse(bad).is_err(), "{bad}");
        }
        assert_eq!(Console::parse("/a/log"), Ok(Console::File("/a/log".into())));
    }
}
