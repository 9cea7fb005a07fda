//! Metrics and health over plain HTTP, at a loopback address: `/metrics`, `/healthz`, `/readyz`.

use std::convert::Infallible;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use http_body_util::Full;
use hyper::body::{Bytes, Incoming};
use hyper::header::{CONTENT_TYPE, HeaderValue};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use tokio::net::TcpListener;
use tokio::sync::Semaphore;
use tokio::time::timeout;
use tracing::error;

use super::site::Site;

/// What a scraper and a few people need.
const CONNECTIONS: usize = 16;
/// How long a connection may take, whatever is asked on it.
const LONGEST: Duration = Duration::from_secs(30);
/// How long vault or KMS may take to answer before they count as away.
const PATIENCE: Duration = Duration::from_secs(5);
const PAUSE: Duration = Duration::from_millis(200);
const METRICS: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";
const TEXT: &str = "text/plain; charset=utf-8";

/// One thing is looked at by one thread: a vault that hangs must not take more and more of them.
pub(super) struct Health {
    vault: Arc<Semaphore>,
    tenants: Arc<Semaphore>,
}

impl Health {
    pub(super) fn new() -> Health {
        Health { vault: Arc::new(Semaphore::new(1)), tenants: Arc::new(Semaphore::new(1)) }
    }

    /// Looks, on a thread of its own, for as long as patience lasts.
    async fn look(
        turn: &Arc<Semaphore>,
        what: &str,
        look: impl FnOnce() -> Result<(), String> + Send + 'static,
    ) -> Result<(), String> {
        let hangs = || format!("{what} does not answer");
        let looked = async {
            let turn = turn.clone().acquire_owned().await.map_err(|_| hangs())?;
            let looking = move || {
                let _turn = turn;
                look()
            };
            tokio::task::spawn_blocking(looking).await.map_err(|_| hangs())?
        };
        timeout(PATIENCE, looked).await.unwrap_or_else(|_| Err(hangs()))
    }

    async fn vault(&self, site: &Arc<Site>) -> Result<(), String> {
        let site = site.clone();
        Health::look(&self.vault, "the vault", move || site.tenants.check_vault()).await
    }

    async fn tenants(&self, site: &Arc<Site>) -> Result<(), String> {
        let site = site.clone();
        Health::look(&self.tenants, "a KMS", move || site.tenants.check(&site.config().tenants())).await
    }
}

/// Listens there.
pub(super) async fn listen(at: SocketAddr) -> io::Result<TcpListener> {
    TcpListener::bind(at).await.map_err(|e| io::Error::new(e.kind(), format!("metrics at {at}: {e}")))
}

/// Answers until the server ends.
pub(super) async fn serve(listener: TcpListener, site: Arc<Site>) {
    let (room, health) = (Arc::new(Semaphore::new(CONNECTIONS)), Arc::new(Health::new()));
    loop {
        let Ok(permit) = room.clone().acquire_owned().await else { return };
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(e) => {
                error!("can't accept a connection for metrics: {e}");
                tokio::time::sleep(PAUSE).await;
                continue;
            }
        };
        let (site, health) = (site.clone(), health.clone());
        tokio::spawn(async move {
            let service = service_fn(move |request| answer(request, site.clone(), health.clone()));
            let mut http = http1::Builder::new();
            let connection =
                http.keep_alive(false).max_buf_size(16 << 10).serve_connection(TokioIo::new(stream), service);
            // Whoever asks too slowly, or goes, is none of ours.
            let _ = timeout(LONGEST, connection).await;
            drop(permit);
        });
    }
}

async fn answer(
    request: Request<Incoming>,
    site: Arc<Site>,
    health: Arc<Health>,
) -> Result<Response<Full<Bytes>>, Infallible> {
    let said = |found: Result<(), String>| match found {
        Ok(()) => (StatusCode::OK, TEXT, "ok\n".to_owned()),
        Err(why) => (StatusCode::SERVICE_UNAVAILABLE, TEXT, why + "\n"),
    };
    let (status, kind, text) = match (request.method(), request.uri().path()) {
        (&Method::GET, "/metrics") => {
            let asked = site.clone();
            // What is added to it may have to read.
            let text = tokio::task::spawn_blocking(move || asked.metrics_text()).await;
            (StatusCode::OK, METRICS, text.unwrap_or_default())
        }
        (&Method::GET, "/healthz") => said(health.vault(&site).await),
        (&Method::GET, "/readyz") => said(match health.vault(&site).await {
            Ok(()) => health.tenants(&site).await,
            failed => failed,
        }),
        (&Method::GET, _) => (StatusCode::NOT_FOUND, TEXT, "there are /metrics, /healthz and /readyz\n".into()),
        _ => (StatusCode::METHOD_NOT_ALLOWED, TEXT, "GET only\n".into()),
    };
    let mut response = Response::new(Full::new(Bytes::from(text)));
    *response.status_mut() = status;
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(kind));
    Ok(response)
}
