//! What is looked at before a guest is compiled. Compilers take time and memory that grow faster than what they are
//! given: 67 KB of functions with many variables, or 4 MB of empty ones, cost hundreds of megabytes.

use wasmparser::{Operator, Parser, Payload};

use crate::{
    limits::CompileLimits,
    sandbox::{LoadError, engine::CORE_INSTANCES_MAX, instances::core_instances},
};

/// Sees that a binary is within the limits. Reads every instruction once, and believes none.
///
/// # Errors
/// [`LoadError::TooComplex`] names the function, what it has too much of, and the flag that allows it.
pub(crate) fn precheck(wasm: &[u8], limits: &CompileLimits) -> Result<(), LoadError> {
    let invalid = |error: wasmparser::BinaryReaderError| LoadError::Invalid { reason: error.to_string() };
    if core_instances(wasm).map_err(invalid)? > CORE_INSTANCES_MAX.into() {
        return Err(LoadError::TOO_MANY_INSTANCES);
    }
    let mut functions = 0u64;
    for payload in Parser::new(0).parse_all(wasm) {
        match payload.map_err(invalid)? {
            Payload::CodeSectionStart { count, .. } => {
                // before the bodies are read: a count is one number, whatever follows
                check("the guest", "functions", functions + u64::from(count), limits.functions.into(), "functions")?;
            }
            Payload::CodeSectionEntry(body) => {
                let name = format!("function {functions}");
                functions += 1;
                let check = |what, found, max, flag| check(&name, what, found, max, flag);
                check("bytes", body.range().len() as u64, limits.body.0, "body")?;
                let mut locals = 0u64;
                for group in body.get_locals_reader().map_err(invalid)? {
                    locals += u64::from(group.map_err(invalid)?.0);
                }
                check("local variables", locals, limits.locals.into(), "locals")?;
                let mut nesting = 0u64;
                for operator in body.get_operators_reader().map_err(invalid)? {
                    match operator.map_err(invalid)? {
                        Operator::Block { .. }
                        | Operator::Loop { .. }
                        | Operator::If { .. }
                        | Operator::TryTable { .. } => {
                            nesting += 1;
                            check("blocks in each other", nesting, limits.nesting.into(), "nesting")?;
                        }
                        Operator::End => nesting = nesting.saturating_sub(1),
                        _ => {}
                    }
                }
            }
            _ => {}
        }
    }
    Ok(())
}

fn check(whose: &str, what: &'static str, found: u64, max: u64, flag: &'static str) -> Result<(), LoadError> {
    if found <= max {
        return Ok(());
    }
    Err(LoadError::TooComplex { whose: whose.into(), what, found, max, flag })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::limits::Bytes;

    const LIMITS: CompileLimits = CompileLimits {
        functions: 3,
        locals: 4,
        body: Bytes(40),
        nesting: 2,
        time: std::time::Duration::MAX,
        memory: Bytes(u64::MAX),
    };

    fn problem(wat: &str) -> Option<String> {
        precheck(&wat::parse_str(wat).expect("WAT"), &LIMITS).err().map(|error| error.to_string())
    }

    #[test]
    fn what_is_at_a_limit_passes_and_what_is_beyond_is_named() {
        let locals = |n: usize| format!("(module (func) (func (local{})))", " i32".repeat(n));
        let nops = |n: usize| format!("(module (func{}))", " nop".repeat(n));
        let blocks = |n: usize| format!("(module (func {} {}))", "block ".repeat(n), "end ".repeat(n));
        let functions = |n: usize| format!("(component (core module {}) (core module (func)))", "(func)".repeat(n));
        assert_eq!(problem(&locals(4)), None);
        assert_eq!(problem(&nops(38)), None);
        assert_eq!(problem(&blocks(2)), None);
        assert_eq!(problem(&functions(2)), None);
        // one after the other is not in each other
        assert_eq!(problem("(module (func block end block end block end loop end))"), None);
        for (wat, expected) in [
            (locals(5), "function 1 has 5 local variables, more than the 4 that are compiled (--compile-locals)"),
            (nops(39), "function 0 has 41 bytes, more than the 40 that are compiled (--compile-body)"),
            (blocks(3), "function 0 has 3 blocks in each other, more than the 2 that are compiled (--compile-nesting)"),
            (functions(3), "the guest has 4 functions, more than the 3 that are compiled (--compile-functions)"),
        ] {
            assert_eq!(problem(&wat).as_deref(), Some(expected));
        }
    }
}
