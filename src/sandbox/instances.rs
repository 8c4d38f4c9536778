//! How many core instances a component makes. One that instantiates another one twice, which does the same, and so on,
//! is small and has millions of them, each of which a compiler looks at. The engine counts them when they are made.

use wasmparser::{
    ComponentAlias, ComponentExternalKind, ComponentInstance, ComponentOuterAliasKind, ComponentTypeRef, Encoding,
    Instance, Parser, Payload, Result,
};

/// A component, as far as it has been read.
#[derive(Default)]
struct Component {
    /// How many core instances each component makes that has a number in this one.
    numbered: Vec<u64>,
    /// How many this one makes.
    instances: u64,
}

/// How many core instances a guest has, when it is a component. Components that come as values, which are rare, are
/// taken for empty.
///
/// # Errors
/// When its outline is broken.
pub(super) fn core_instances(wasm: &[u8]) -> Result<u64> {
    // what is being read, and what it is in; a module has no numbers
    let mut within: Vec<Option<Component>> = vec![];
    for payload in Parser::new(0).parse_all(wasm) {
        match payload? {
            Payload::Version { encoding, .. } => {
                within.push((encoding == Encoding::Component).then(Component::default));
            }
            Payload::End(_) => {
                let ended = within.pop().flatten();
                match (ended, within.last_mut()) {
                    (Some(ended), Some(Some(outer))) => outer.numbered.push(ended.instances),
                    (Some(ended), _) => return Ok(ended.instances),
                    (None, _) => {}
                }
            }
            Payload::ComponentAliasSection(section) => {
                for alias in section {
                    let instances = match alias? {
                        ComponentAlias::Outer { kind: ComponentOuterAliasKind::Component, count, index } => {
                            let outer = within.iter().rev().nth(count as usize).and_then(Option::as_ref);
                            outer.and_then(|outer| outer.numbered.get(index as usize).copied()).unwrap_or(0)
                        }
                        ComponentAlias::InstanceExport { kind: ComponentExternalKind::Component, .. } => 0,
                        _ => continue,
                    };
                    number(&mut within, instances);
                }
            }
            Payload::ComponentImportSection(section) => {
                for import in section {
                    if let ComponentTypeRef::Component(_) = import?.ty {
                        number(&mut within, 0);
                    }
                }
            }
            Payload::ComponentExportSection(section) => {
                for export in section {
                    let export = export?;
                    if export.kind == ComponentExternalKind::Component {
                        let instances = instances_of(&within, export.index);
                        number(&mut within, instances);
                    }
                }
            }
            Payload::InstanceSection(section) => {
                for instance in section {
                    if let Instance::Instantiate { .. } = instance? {
                        make(&mut within, 1);
                    }
                }
            }
            Payload::ComponentInstanceSection(section) => {
                for instance in section {
                    if let ComponentInstance::Instantiate { component_index, .. } = instance? {
                        let instances = instances_of(&within, component_index);
                        make(&mut within, instances);
                    }
                }
            }
            _ => {}
        }
    }
    Ok(0)
}

/// How many core instances the component of this number makes; what is not valid shows later.
fn instances_of(within: &[Option<Component>], index: u32) -> u64 {
    let innermost = within.last().and_then(Option::as_ref);
    innermost.and_then(|component| component.numbered.get(index as usize).copied()).unwrap_or(0)
}

/// Gives the next number to a component that makes so many.
fn number(within: &mut [Option<Component>], instances: u64) {
    if let Some(Some(component)) = within.last_mut() {
        component.numbered.push(instances);
    }
}

/// Makes so many more.
fn make(within: &mut [Option<Component>], instances: u64) {
    if let Some(Some(component)) = within.last_mut() {
        component.instances = component.instances.saturating_add(instances);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn instances_are_counted_where_they_are_made() {
        let module = "(core module $m)";
        let one = "(core instance (instantiate $m))";
        let c = format!("(component $c {module} {one} {one})");
        for (wat, expected) in [
            ("(module)".to_owned(), 0),
            (format!("(component {module})"), 0),
            (format!("(component {module} {one} (core instance))"), 1),
            // what is only defined makes none
            (format!("(component {c})"), 0),
            (format!("(component {c} (instance (instantiate $c)) (instance (instantiate $c)))"), 4),
            (
                format!(
                    "(component {c} (component $d (alias outer 1 $c (component $e)) (instance (instantiate $e))) (instance (instantiate $d)))"
                ),
                2,
            ),
            (format!(r#"(component {c} (export $d "d" (component $c)) (instance (instantiate $d)))"#), 2),
            (
                format!(
                    r#"(component (import "i" (component $i)) {c} (instance (instantiate $i)) (instance (instantiate $c)))"#
                ),
                2,
            ),
        ] {
            assert_eq!(core_instances(&wat::parse_str(&wat).expect("WAT")).expect("whole"), expected, "{wat}");
        }
    }
}
