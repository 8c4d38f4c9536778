//! TLS of outgoing requests.

use std::{io, path::PathBuf, sync::Arc};

use rustls::{ClientConfig, RootCertStore, crypto::ring, pki_types::ServerName};
use serde::{Deserialize, Serialize};
use tokio::net::TcpStream;
use tokio_rustls::{TlsConnector, client::TlsStream};
use wasmtime_wasi_http::Error;

use crate::grant::Target;

/// Where the certificates of those are that are trusted to vouch for servers, when it is not where the system has them.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub(crate) struct Roots {
    /// `SSL_CERT_FILE`
    file: Option<PathBuf>,
    /// `SSL_CERT_DIR`
    dir: Option<PathBuf>,
}

impl Roots {
    /// What this process was told; its children have no environment.
    pub(crate) fn of_environment() -> Self {
        let path = |name| std::env::var_os(name).map(PathBuf::from);
        Self { file: path("SSL_CERT_FILE"), dir: path("SSL_CERT_DIR") }
    }
}

/// How connections are secured.
pub(super) struct Tls {
    config: Arc<ClientConfig>,
    has_roots: bool,
}

impl Tls {
    /// Reads the certificates, before files can no longer be opened. What is no certificate is left out.
    pub(super) fn prepare(roots: &Roots) -> Self {
        let found = match (&roots.file, &roots.dir) {
            (None, None) => rustls_native_certs::load_native_certs(),
            (file, dir) => rustls_native_certs::load_certs_from_paths(file.as_deref(), dir.as_deref()),
        };
        let mut store = RootCertStore::empty();
        store.add_parsable_certificates(found.certs);
        let has_roots = !store.is_empty();
        let mut config = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
            .with_safe_default_protocol_versions()
            .expect("the provider has them")
            .with_root_certificates(store)
            .with_no_client_auth();
        config.alpn_protocols = vec![b"http/1.1".to_vec()];
        Self { config: Arc::new(config), has_roots }
    }

    /// Secures a connection to this host.
    pub(super) async fn connect(&self, target: &Target, stream: TcpStream) -> Result<TlsStream<TcpStream>, Error> {
        if !self.has_roots {
            return Err(Error::ConfigurationError);
        }
        let name = match target {
            Target::Name(name) => ServerName::try_from(name.clone()).map_err(|_| Error::HttpRequestUriInvalid)?,
            Target::Address(ip) => ServerName::from(*ip),
        };
        TlsConnector::from(self.config.clone()).connect(name, stream).await.map_err(|error| code_of(&error))
    }
}

fn code_of(error: &io::Error) -> Error {
    match error.get_ref().and_then(|inner| inner.downcast_ref()) {
        Some(rustls::Error::InvalidCertificate(_) | rustls::Error::NoCertificatesPresented) => {
            Error::TlsCertificateError
        }
        Some(rustls::Error::AlertReceived(alert)) => Error::TlsAlertReceived {
            alert_id: Some(u8::from(*alert)),
            alert_message: alert.as_str().map(str::to_owned),
        },
        Some(_) => Error::TlsProtocolError,
        None => Error::ConnectionTerminated,
    }
}
