//! Whether a module speaks the interfaces that it says it does: its bindings leave the world that they were made of in a
//! custom section, and what stands there of `wrun:guest` must be what stands in `wit/`.
//!
//! A core module's imports and exports have flat types, in which a list, a string and two numbers look the same. A mismatch
//! would show as nonsense in a guest's memory; here it is refused by the name of the function.

use std::{collections::BTreeMap, fmt::Write as _, sync::LazyLock};

use wasmparser::{Parser, Payload};
use wit_parser::{Function, Handle, InterfaceId, Resolve, Type, TypeDefKind, WorldItem, decoding::decode_world};

use crate::sandbox::LoadError;

/// What host and guests share, each file as it is; first the one that names the package.
const CONTRACT: [&str; 7] = [
    include_str!("../../../wit/types.wit"),
    include_str!("../../../wit/handler.wit"),
    include_str!("../../../wit/mailbox.wit"),
    include_str!("../../../wit/thread.wit"),
    include_str!("../../../wit/window.wit"),
    include_str!("../../../wit/worker.wit"),
    include_str!("../../../wit/worlds.wit"),
];

/// What the custom sections are called, followed by what the bindings call their world.
const SECTION: &str = "component-type";

/// The functions of some interfaces, by `interface.function`, each with its signature.
type Signatures = BTreeMap<String, String>;

static OURS: LazyLock<Signatures> = LazyLock::new(|| {
    let mut resolve = Resolve::default();
    let package = resolve.push_source("wit", &CONTRACT.join("\n")).expect("the contract is valid");
    let mut signatures = Signatures::new();
    for (name, interface) in &resolve.packages[package].interfaces {
        functions(&resolve, name, *interface, &mut signatures);
    }
    signatures
});

/// Sees that a module's own idea of `wrun:guest` is ours.
///
/// # Errors
/// [`LoadError::Mismatch`] names the function that differs.
pub(in crate::sandbox) fn check(wasm: &[u8]) -> Result<(), LoadError> {
    let mismatch = |reason: String| LoadError::Mismatch { reason };
    let mut worlds = 0;
    for payload in Parser::new(0).parse_all(wasm) {
        let payload = payload.map_err(|error| LoadError::Invalid { reason: error.to_string() })?;
        let Payload::CustomSection(section) = payload else { continue };
        if !section.name().starts_with(SECTION) {
            continue;
        }
        worlds += 1;
        let (resolve, world) = decode_world(section.data())
            .map_err(|error| mismatch(format!("its section `{}` is no world: {error:#}", section.name())))?;
        let world = &resolve.worlds[world];
        for (key, item) in world.imports.iter().chain(&world.exports) {
            let WorldItem::Interface { id, .. } = item else { continue };
            let name = resolve.name_world_key(key);
            let Some(interface) = name.strip_prefix("wrun:guest/").and_then(|rest| rest.split_once('@')) else {
                continue;
            };
            for (function, definition) in &resolve.interfaces[*id].functions {
                let function = format!("{}.{function}", interface.0);
                // known by its name first: the types of others may be of any size
                let ours = OURS.get(&function);
                let theirs = ours.map(|_| signature(&resolve, definition));
                match (ours, theirs) {
                    (Some(ours), Some(signature)) if *ours != signature => {
                        return Err(mismatch(format!(
                            "`wrun:guest/{function}` is `{ours}` in wrun, and `{signature}` in the guest"
                        )));
                    }
                    (Some(_), _) => {}
                    (None, _) => {
                        return Err(mismatch(format!("wrun's `wrun:guest/{}` has no `{function}`", interface.0)));
                    }
                }
            }
        }
    }
    if worlds == 0 {
        let missing = "it has no section `component-type`, which says what interfaces it was built against";
        return Err(mismatch(missing.into()));
    }
    Ok(())
}

fn functions(resolve: &Resolve, name: &str, interface: InterfaceId, to: &mut Signatures) {
    for (function, definition) in &resolve.interfaces[interface].functions {
        to.insert(format!("{name}.{function}"), signature(resolve, definition));
    }
}

fn signature(resolve: &Resolve, function: &Function) -> String {
    let mut text = String::from("func(");
    for (index, parameter) in function.params.iter().enumerate() {
        let comma = if index == 0 { "" } else { ", " };
        let _ = write!(text, "{comma}{}", of_type(resolve, parameter.ty));
    }
    text.push(')');
    if let Some(result) = function.result {
        let _ = write!(text, " -> {}", of_type(resolve, result));
    }
    text
}

/// A type with all that it is made of: names of types are each side's own.
fn of_type(resolve: &Resolve, ty: Type) -> String {
    let Type::Id(id) = ty else {
        return match ty {
            Type::Bool => "bool",
            Type::U8 => "u8",
            Type::U16 => "u16",
            Type::U32 => "u32",
            Type::U64 => "u64",
            Type::S8 => "s8",
            Type::S16 => "s16",
            Type::S32 => "s32",
            Type::S64 => "s64",
            Type::F32 => "f32",
            Type::F64 => "f64",
            Type::Char => "char",
            Type::String => "string",
            Type::ErrorContext => "error-context",
            Type::Id(_) => unreachable!("looked at above"),
        }
        .into();
    };
    let of = |ty: Type| of_type(resolve, ty);
    let maybe = |ty: Option<Type>| ty.map_or("_".into(), of);
    let all = |parts: Vec<String>| parts.join(", ");
    match &resolve.types[id].kind {
        TypeDefKind::Type(ty) => of(*ty),
        TypeDefKind::Record(record) => {
            let fields = record.fields.iter().map(|field| format!("{}: {}", field.name, of(field.ty)));
            format!("record {{ {} }}", all(fields.collect()))
        }
        TypeDefKind::Variant(variant) => {
            let cases = variant.cases.iter().map(|case| match case.ty {
                Some(ty) => format!("{}({})", case.name, of(ty)),
                None => case.name.clone(),
            });
            format!("variant {{ {} }}", all(cases.collect()))
        }
        TypeDefKind::Enum(cases) => {
            let cases = cases.cases.iter().map(|case| case.name.clone());
            format!("enum {{ {} }}", all(cases.collect()))
        }
        TypeDefKind::Flags(flags) => {
            let flags = flags.flags.iter().map(|flag| flag.name.clone());
            format!("flags {{ {} }}", all(flags.collect()))
        }
        TypeDefKind::Option(ty) => format!("option<{}>", of(*ty)),
        TypeDefKind::Result(result) => format!("result<{}, {}>", maybe(result.ok), maybe(result.err)),
        TypeDefKind::List(ty) => format!("list<{}>", of(*ty)),
        TypeDefKind::Tuple(tuple) => format!("tuple<{}>", all(tuple.types.iter().copied().map(of).collect())),
        TypeDefKind::Handle(Handle::Own(_)) => "own".into(),
        TypeDefKind::Handle(Handle::Borrow(_)) => "borrow".into(),
        // the contract has none of these
        other => format!("a {}", other.as_str()),
    }
}
