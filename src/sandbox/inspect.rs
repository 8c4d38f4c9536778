//! What a guest is, read off its binary without compiling or believing it.

use std::fmt;

use serde::{Deserialize, Serialize};
use wasmparser::{Encoding, MemoryType, Parser, Payload, TypeRef, WasmFeatures};

use crate::sandbox::LoadError;

/// What a guest is and what it asks for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Inspection {
    /// Component or core module.
    pub form: Form,
    /// What it exports to be driven by; none when wrun knows no way to run it.
    pub shape: Option<Shape>,
    /// The names of what it imports, `module::field` for a core module.
    pub imports: Vec<String>,
    /// The names of what it exports.
    pub exports: Vec<String>,
    /// The size of the binary in bytes.
    pub bytes: u64,
    /// The size of the code in it, in bytes.
    pub code_bytes: u64,
    /// The size of the initialised data in it, in bytes.
    pub data_bytes: u64,
    /// How many functions it defines.
    pub functions: u32,
    /// The least memory that it can start with, in bytes.
    pub memory_min: u64,
    /// How many linear memories it defines.
    pub memories: u32,
    /// Whether it throws exceptions; the engine keeps them in a heap beside its memories.
    pub throws: bool,
    /// The name of the shared memory that it imports: then it can have threads.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub shared_memory: Option<String>,
}

/// How a guest is packed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Form {
    /// A component (WASI 0.2).
    Component,
    /// A core module (WASI preview 1).
    Module,
}

/// What a guest can be driven by.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Shape {
    /// It runs from start to end: `wasi:cli/run`, or `_start`.
    Command,
    /// It answers HTTP requests: `wasi:http/incoming-handler`.
    Http,
    /// It answers messages: `wrun:guest/handler`.
    Handler,
}

impl Shape {
    /// The modes that can run it.
    pub(super) fn modes(self, form: Form, threads: bool) -> &'static [&'static str] {
        match (self, form) {
            (Self::Command, _) if threads => &["threads", "run", "spawn", "exec", "fork"],
            (Self::Command, _) => &["run", "spawn", "exec", "fork"],
            (Self::Handler, Form::Component) => &["cluster", "fork", "threads"],
            (Self::Http, Form::Component) => &["cluster"],
            (Self::Handler, Form::Module) if threads => &["threads"],
            (Self::Handler | Self::Http, Form::Module) => &[],
        }
    }
}

impl fmt::Display for Form {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Component => "component",
            Self::Module => "core module",
        })
    }
}

impl fmt::Display for Shape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Command => "command",
            Self::Http => "http",
            Self::Handler => "handler",
        })
    }
}

impl Inspection {
    /// Reads what a binary is. Its outline must be whole; whether its code is valid shows when it is compiled.
    ///
    /// # Errors
    /// [`LoadError::Invalid`] with the offset where the outline breaks.
    pub fn of(wasm: &[u8]) -> Result<Self, LoadError> {
        let invalid = |error: wasmparser::BinaryReaderError| LoadError::Invalid { reason: error.to_string() };
        let mut found = Self {
            form: Form::Module,
            shape: None,
            imports: vec![],
            exports: vec![],
            bytes: wasm.len() as u64,
            code_bytes: 0,
            data_bytes: 0,
            functions: 0,
            memory_min: 0,
            memories: 0,
            throws: false,
            shared_memory: None,
        };
        // sections of modules inside of a component count for its size but not for what it imports
        let mut depth = 0u32;
        let mut parser = Parser::new(0);
        // imports that share the name of their module: few bytes could stand for gigabytes of names, and the engine
        // refuses them anyway
        parser.set_features(WasmFeatures::all().difference(WasmFeatures::COMPACT_IMPORTS));
        for payload in parser.parse_all(wasm) {
            match payload.map_err(invalid)? {
                Payload::Version { encoding, .. } if depth == 0 => {
                    found.form = match encoding {
                        Encoding::Component => Form::Component,
                        Encoding::Module => Form::Module,
                    };
                }
                Payload::ModuleSection { .. } | Payload::ComponentSection { .. } => depth += 1,
                Payload::End(_) => depth = depth.saturating_sub(1),
                Payload::ImportSection(section) if depth == 0 => {
                    for import in section.into_imports() {
                        let import = import.map_err(invalid)?;
                        let name = format!("{}::{}", import.module, import.name);
                        if let TypeRef::Memory(memory) = import.ty {
                            // an imported one is not among those that are defined
                            found.memory_min = found.memory_min.saturating_add(bytes_of(&memory));
                            if memory.shared {
                                found.shared_memory = Some(name.clone());
                            }
                        }
                        add(&mut found.imports, name)?;
                    }
                }
                Payload::ExportSection(section) if depth == 0 => {
                    for export in section {
                        add(&mut found.exports, export.map_err(invalid)?.name.into())?;
                    }
                }
                Payload::ComponentImportSection(section) if depth == 0 => {
                    for import in section {
                        add(&mut found.imports, import.map_err(invalid)?.name.name.into())?;
                    }
                }
                Payload::ComponentExportSection(section) if depth == 0 => {
                    for export in section {
                        add(&mut found.exports, export.map_err(invalid)?.name.name.into())?;
                    }
                }
                Payload::CodeSectionStart { count, size, .. } => {
                    found.functions = found.functions.saturating_add(count);
                    found.code_bytes += u64::from(size);
                }
                Payload::MemorySection(section) => {
                    found.memories = found.memories.saturating_add(section.count());
                    for memory in section {
                        found.memory_min = found.memory_min.saturating_add(bytes_of(&memory.map_err(invalid)?));
                    }
                }
                Payload::TagSection(section) => found.throws |= section.count() > 0,
                Payload::DataSection(section) => found.data_bytes += section.range().len() as u64,
                _ => {}
            }
        }
        found.shape = found.shape_by_exports();
        Ok(found)
    }

    /// Whether it can have threads, which share a memory.
    #[must_use]
    pub fn has_threads(&self) -> bool {
        self.shared_memory.is_some()
    }

    /// The modes that can run it, when it imports nothing that is not offered.
    #[must_use]
    pub fn modes(&self) -> &'static [&'static str] {
        self.shape.map_or(&[], |shape| shape.modes(self.form, self.has_threads()))
    }

    fn shape_by_exports(&self) -> Option<Shape> {
        let exports = |prefix: &str| self.exports.iter().any(|name| name.starts_with(prefix));
        if exports("wrun:guest/handler@0.1.") {
            Some(Shape::Handler)
        } else if exports("wasi:http/incoming-handler@0.2.") {
            Some(Shape::Http)
        } else if exports("wasi:cli/run@0.2.") || (self.form == Form::Module && exports("_start")) {
            Some(Shape::Command)
        } else {
            None
        }
    }
}

/// What a memory starts with.
fn bytes_of(memory: &MemoryType) -> u64 {
    let page = 1u64.checked_shl(memory.page_size_log2.unwrap_or(16)).unwrap_or(u64::MAX);
    memory.initial.saturating_mul(page)
}

/// The most imports or exports; the engine takes no more of a core module.
const NAMES_MAX: usize = 1_000_000;

/// Adds a name to a list. Each takes many times the memory here that it takes in a guest.
fn add(names: &mut Vec<String>, name: String) -> Result<(), LoadError> {
    if names.len() == NAMES_MAX {
        return Err(LoadError::Invalid { reason: format!("it has more than {NAMES_MAX} imports or exports") });
    }
    names.push(name);
    Ok(())
}

/// Whether wrun offers an import, by its name; whether the types agree shows when it is linked.
pub(crate) fn offered(guest: &Inspection, import: &str) -> bool {
    match guest.form {
        Form::Module if guest.has_threads() => {
            let ours = ["worker", "mailbox", "thread"].map(|name| format!("wrun:guest/{name}@0.1.0::"));
            guest.shared_memory.as_deref() == Some(import)
                || import == "wasi::thread-spawn"
                || import.starts_with("wasi_snapshot_preview1::")
                || ours.iter().any(|interface| import.starts_with(interface))
        }
        Form::Module => import.starts_with("wasi_snapshot_preview1::"),
        Form::Component => import.split_once('@').is_some_and(|(interface, version)| {
            let wasi = ["cli", "clocks", "filesystem", "http", "io", "random", "sockets"];
            let package = interface.split_once('/').map_or(interface, |(package, _)| package);
            match package.split_once(':') {
                Some(("wasi", name)) => wasi.contains(&name) && version.starts_with("0.2."),
                Some(("wrun", "guest")) => version.starts_with("0.1."),
                _ => false,
            }
        }),
    }
}

/// What to do about an import that wrun does not offer.
pub(crate) fn import_hint(import: &str) -> &'static str {
    let known: &[(&str, &str)] = &[
        ("wasi:http/", "wrun offers wasi:http 0.2; build the guest for that"),
        ("wasi:sockets/", "build the guest for WASI 0.2.x; sockets of other versions are not offered"),
        (
            "wasi::thread-spawn",
            "threads share a memory, which the guest must import (`--target wasm32-wasip1-threads` does)",
        ),
        (
            "env::memory",
            "a memory is imported by guests with threads only, and shared (`--target wasm32-wasip1-threads`)",
        ),
        ("wasi:", "wrun offers WASI 0.2; build the guest for that (`--target wasm32-wasip2`)"),
        ("wrun:guest/", "wrun offers wrun:guest@0.1.0; build the guest against that"),
        ("wasi_snapshot_preview1::", "that function is not part of WASI preview 1"),
        ("env::", "an import from `env` is usually a C function that was not linked in"),
        ("wbg", "that module was made for a browser (wasm-bindgen); build it for wasm32-wasip2"),
        ("__wbindgen", "that module was made for a browser (wasm-bindgen); build it for wasm32-wasip2"),
    ];
    known
        .iter()
        .find(|(prefix, _)| import.starts_with(prefix))
        .map_or("wrun offers WASI preview 1, WASI 0.2 and wrun:guest@0.1.0", |(_, hint)| hint)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn inspect(wat: &str) -> Inspection {
        Inspection::of(&wat::parse_str(wat).expect("WAT")).expect("whole")
    }

    #[test]
    fn shapes_are_told_apart_by_exports() {
        let command = inspect(
            r#"(module (import "wasi_snapshot_preview1" "proc_exit" (func (param i32))) (func (export "_start")))"#,
        );
        assert_eq!((command.form, command.shape), (Form::Module, Some(Shape::Command)));
        assert_eq!(command.imports, ["wasi_snapshot_preview1::proc_exit"]);
        assert_eq!(inspect(r#"(module (func (export "add")))"#).shape, None);
        assert_eq!(inspect("(component (core module (memory 2)) (core module (memory 3 9)))").memory_min, 5 << 16);
        assert!(inspect("(component (core module (tag)))").throws && !inspect("(module (func))").throws);
        let nested = inspect(r#"(component (core module (func (export "_start"))))"#);
        assert_eq!((nested.form, nested.shape, nested.functions), (Form::Component, None, 1));
    }

    #[test]
    fn so_many_names_are_kept_and_no_more() {
        // of a memory each, with no names
        let memories = |count: usize| {
            let entries = b"\0\0\x02\0\x01".repeat(count);
            let size = u32::try_from(entries.len() + 5).expect("small");
            let long = |mut n: u32| {
                let mut bytes = [0x80; 5];
                for byte in &mut bytes {
                    *byte |= (n & 0x7f) as u8;
                    n >>= 7;
                }
                bytes[4] &= 0x7f;
                bytes
            };
            let count = long(u32::try_from(count).expect("small"));
            [&b"\0asm\x01\0\0\0\x02"[..], &long(size), &count, &entries].concat()
        };
        assert_eq!(Inspection::of(&memories(NAMES_MAX)).expect("whole").imports.len(), NAMES_MAX);
        let error = Inspection::of(&memories(NAMES_MAX + 1)).expect_err("refused").to_string();
        assert!(error.contains("more than 1000000 imports"), "{error}");
    }

    #[test]
    fn imports_that_share_a_name_are_refused() {
        // one module `a`, two functions, with a type each or one for both
        let each = b"\x02\x0e\x01\x01a\x00\x7f\x02\x01b\x00\x00\x01c\x00\x00";
        let both = b"\x02\x0c\x01\x01a\x00\x7e\x00\x00\x02\x01b\x01c";
        for section in [&each[..], both] {
            let wasm = [b"\0asm\x01\0\0\0", &b"\x01\x04\x01\x60\0\0"[..], section].concat();
            let error = Inspection::of(&wasm).expect_err("refused").to_string();
            assert!(error.contains("compact imports proposal disabled"), "{error}");
        }
    }

    #[test]
    fn imports_are_known_by_name_and_version() {
        let component = inspect("(component)");
        let module = inspect("(module)");
        let threads = inspect(r#"(module (import "env" "memory" (memory 1 2 shared)))"#);
        for (guest, import, expected) in [
            (&component, "wasi:cli/environment@0.2.9", true),
            (&component, "wasi:cli/environment@0.3.0", false),
            (&component, "wasi:http/types@0.2.0", true),
            (&component, "wasi:http/handler@0.3.0", false),
            (&component, "wrun:guest/worker@0.1.0", true),
            (&component, "host", false),
            (&module, "wasi_snapshot_preview1::fd_write", true),
            (&module, "wasi::thread-spawn", false),
            (&threads, "wasi::thread-spawn", true),
            (&threads, "env::memory", true),
            (&threads, "env::table", false),
            (&threads, "wrun:guest/worker@0.1.0::get-data", true),
            (&module, "wrun:guest/worker@0.1.0::get-data", false),
        ] {
            assert_eq!(offered(guest, import), expected, "{import}");
        }
    }

    #[test]
    fn a_broken_outline_names_the_offset() {
        let whole = wat::parse_str(r#"(module (func (export "_start")))"#).expect("WAT");
        for length in 5..whole.len() {
            // cut between two sections, what is left is a whole, smaller module
            if let Err(error) = Inspection::of(&whole[..length]) {
                assert!(error.to_string().contains("offset"), "{length}: {error}");
            }
        }
        assert!(Inspection::of(&whole[..whole.len() - 1]).is_err());
    }
}
