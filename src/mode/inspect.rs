//! `wrun inspect`: what a guest is, what it asks for, what can run it.

use std::path::Path;

use serde::Serialize;

use crate::{
    Error,
    sandbox::{Form, Guest, Inspection, binary, import_hint, offered},
};

/// What there is to say about a guest. As JSON: one flat object.
#[derive(Debug, Clone, Serialize)]
pub struct Report {
    /// Its name.
    pub name: String,
    /// What it is.
    #[serde(flatten)]
    pub inspection: Inspection,
    /// The modes of wrun that can run it.
    pub modes: Vec<&'static str>,
    /// The flags that give it what it imports.
    pub flags: Vec<&'static str>,
    /// What it imports that wrun does not offer, and what to do about it.
    pub refused: Vec<Refused>,
}

/// An import that wrun does not offer.
#[derive(Debug, Clone, Serialize)]
pub struct Refused {
    /// Its name.
    pub import: String,
    /// What to do.
    pub hint: &'static str,
}

/// Looks at a guest without compiling or running it.
///
/// # Errors
/// When it cannot be read or is no guest.
pub fn inspect(path: &Path) -> Result<Report, Error> {
    let guest = Guest::read(path)?;
    let name = guest.name;
    let inspection = Inspection::of(&binary(guest.bytes)?)?;
    let refused: Vec<Refused> = inspection
        .imports
        .iter()
        .filter(|import| !offered(&inspection, import))
        .map(|import| Refused { import: import.clone(), hint: import_hint(import) })
        .collect();
    let modes = if refused.is_empty() { inspection.modes().to_vec() } else { vec![] };
    let imports = |part: &str| inspection.imports.iter().any(|import| import.contains(part));
    let mut flags = vec![];
    if imports("wasi:filesystem/preopens") || imports("::fd_prestat_get") {
        flags.push("--dir");
    }
    if imports("wasi:cli/environment") || imports("::environ_get") {
        flags.push("--env");
    }
    if imports("wasi:http/outgoing-handler") {
        flags.push("--http");
    }
    if imports("wasi:sockets/tcp") {
        flags.push("--tcp");
    }
    if imports("wrun:guest/worker") && (inspection.form == Form::Component || inspection.has_threads()) {
        flags.push("--data");
    }
    Ok(Report { name, inspection, modes, flags, refused })
}
