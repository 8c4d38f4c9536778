//! A version of an app: its guest and its settings, as they were when they were read.

use std::{
    collections::BTreeSet,
    fs::File,
    io::{self, Read},
    os::unix::fs::MetadataExt,
    path::Path,
    sync::Arc,
    time::Duration,
};

use super::{
    folder::{Folder, There, app_of},
    settings::Settings,
};
use crate::{
    Error,
    child::At,
    mode::cluster,
    sandbox::{Guest, Inspection, LoadError, Shape, binary, import_hint, offered},
    settings::{Flaw, SETTINGS_MAX},
};

/// How long a connection of the router's may lie idle that is used again; or a quarter of the grace time. Workers that are
/// to end wait twice as long for what idle ones bring.
const KEEP: Duration = Duration::from_millis(500);

/// Where an app is, and how it is asked.
#[derive(Debug, Clone)]
pub(super) struct Place {
    pub(super) at: At,
    /// How long a request may take.
    pub(super) timeout: Option<Duration>,
    /// How long a connection may lie idle.
    pub(super) keep: Duration,
}

/// A version.
#[derive(Debug)]
pub(super) struct Version {
    /// The first twelve digits of a hash of all that it is made of.
    pub(super) id: String,
    pub(super) guest: Arc<Guest>,
    pub(super) settings: Settings,
    pub(super) at: At,
    /// The pool that it is to be.
    pub(super) pool: cluster::Builder,
}

impl Version {
    /// Reads an app's files. None: they change while they are read.
    ///
    /// # Errors
    /// Why they are none that could be run.
    pub(super) fn read(
        folder: &Folder,
        there: &There,
        app: &str,
        apps: &cluster::Builder,
    ) -> Result<Option<Self>, String> {
        let wasm =
            [format!("{app}.wasm"), format!("{app}.wat")].into_iter().find(|file| there.files.contains_key(file));
        let file = wasm.ok_or_else(|| format!("there is no `{app}.wasm` and no `{app}.wat` for its settings"))?;
        let toml = format!("{app}.toml");
        let text = if there.files.contains_key(&toml) {
            read_text(folder, &toml).map_err(|error| format!("`{toml}`: {error}"))?
        } else {
            Some(String::new())
        };
        let Some(text) = text else { return Ok(None) };
        let in_settings = |flaw: Flaw| format!("`{toml}`: {flaw}");
        let settings = Settings::read(&text).map_err(in_settings)?;
        let at = settings.at(app, &text).map_err(in_settings)?;
        let pool = settings.apply(&text, apps.clone(), &folder.path).map_err(in_settings)?;
        let mut opened = folder.read(&file).map_err(|error| format!("`{file}`: {error}"))?;
        let guest = stable(&mut opened, |opened| {
            let again = opened.try_clone().map_err(|error| error.to_string())?;
            Guest::read_file(again, Path::new(&file)).map_err(|error| error.to_string())
        });
        let Some(guest) = guest?.map(Arc::new) else { return Ok(None) };
        let hash = guest.digest_with(text.as_bytes());
        let first = hash.first_chunk().map_or(0, |first| u64::from_be_bytes(*first));
        let id = format!("{:012x}", first >> 16);
        let pool = pool.with_guest(guest.clone());
        Ok(Some(Self { id, guest, settings, at, pool }))
    }

    #[cfg(test)]
    pub(super) fn for_tests(id: &str) -> Self {
        let guest = Guest { name: id.into(), bytes: vec![] };
        let (settings, at) = (Settings::default(), At::Path(format!("/{id}")));
        Self { id: id.into(), guest: Arc::new(guest), settings, at, pool: cluster::Builder::for_apps() }
    }

    /// Where it is, and how it is asked.
    pub(super) fn place(&self) -> Place {
        let (timeout, grace) = (self.pool.current_limits().timeout, self.pool.current_grace());
        Place { at: self.at.clone(), timeout, keep: KEEP.min(grace / 4) }
    }

    /// Where it is, in words.
    pub(super) fn place_name(&self) -> String {
        match &self.at {
            At::Path(path) => path.clone(),
            At::Host(host) => host.clone(),
        }
    }

    /// Why it could not run, as far as that can be seen without compiling it.
    pub(super) fn would_not_run(&self) -> Option<String> {
        if self.settings.disabled {
            return Some("it is disabled".into());
        }
        let inspection = match binary(self.guest.bytes.clone()).and_then(|bytes| Inspection::of(&bytes)) {
            Ok(inspection) => inspection,
            Err(error) => return Some(error.to_string()),
        };
        if let Some(import) = inspection.imports.iter().find(|import| !offered(&inspection, import)) {
            return Some(format!("it imports `{import}`: {}", import_hint(import)));
        }
        let fits = self.pool.check_guest(&inspection, true);
        fits.and_then(|()| self.pool.check_grants()).err().map(|error| self.why(&error))
    }

    /// Why it is not taken, in words.
    pub(super) fn why(&self, error: &Error) -> String {
        match error {
            Error::Load(LoadError::WrongShape { found: Some(Shape::Command), .. }) if !self.settings.is_command() => {
                format!("{error}; `mode = \"command\"` in its settings lets a run of it answer each request")
            }
            error => error.to_string(),
        }
    }
}

/// The names of all apps that there are files of.
pub(super) fn names(there: &There) -> impl Iterator<Item = &str> {
    let names: BTreeSet<&str> = there.files.keys().filter_map(|file| app_of(file).ok()).collect();
    names.into_iter()
}

/// The files that would make an app if there were not another one for it.
pub(super) fn shadowed(there: &There) -> impl Iterator<Item = (String, &'static str)> {
    let texts = there.files.keys().filter_map(|file| Some((file, file.strip_suffix(".wat")?)));
    let shadowed = texts.filter(|(_, name)| there.files.contains_key(&format!("{name}.wasm")));
    shadowed.map(|(file, _)| (file.clone(), "there is a `.wasm` of the same name"))
}

fn read_text(folder: &Folder, name: &str) -> Result<Option<String>, String> {
    let mut file = folder.read(name).map_err(|error| error.to_string())?;
    stable(&mut file, |file| {
        let mut text = String::new();
        file.take(SETTINGS_MAX + 1).read_to_string(&mut text).map_err(|error| error.to_string())?;
        if text.len() as u64 > SETTINGS_MAX {
            return Err(format!("expected at most {SETTINGS_MAX} bytes of settings"));
        }
        Ok(text)
    })
}

/// What was read of a file, unless that changed meanwhile.
fn stable<T>(file: &mut File, read: impl FnOnce(&mut File) -> Result<T, String>) -> Result<Option<T>, String> {
    let state = |file: &File| -> io::Result<_> {
        let metadata = file.metadata()?;
        Ok((metadata.len(), metadata.mtime(), metadata.mtime_nsec()))
    };
    let before = state(file).map_err(|error| error.to_string())?;
    let read = read(file);
    let after = state(file).map_err(|error| error.to_string())?;
    if after == before { read.map(Some) } else { Ok(None) }
}
