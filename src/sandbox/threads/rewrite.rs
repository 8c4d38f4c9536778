//! What is changed in a module that shares its memory, before it is compiled: the instructions that the engine cannot
//! bound or end become calls of the host.
//!
//! `memory.grow` of a shared memory is not seen by a limiter, and `memory.atomic.wait` is not interrupted by epochs. The
//! calls are imports at the end of the import section, so all functions of the module move up by their number, which is
//! all that changes elsewhere. `memory.atomic.notify` stays what it is: the engine parks those who wait by the instruction
//! and by its own `SharedMemory::atomic_wait` in the same place.

use std::convert::Infallible;

use wasm_encoder::{
    CodeSection, EntityType, Function, ImportSection, Instruction, Module, TypeSection, ValType,
    reencode::{Error, Reencode, utils},
};
use wasmparser::{BinaryReaderError, FunctionBody, ImportSectionReader, Operator, Parser, Payload, TypeRef};

use crate::sandbox::{LoadError, guest};

/// Where the calls go.
pub(in crate::sandbox) const MODULE: &str = "wrun:shared-memory";

/// Replaces the instructions, waits only with `waits`.
///
/// # Errors
/// [`LoadError::Invalid`] when the module is not valid, as far as that shows here.
pub(in crate::sandbox) fn rewrite(wasm: &[u8], waits: bool) -> Result<Vec<u8>, LoadError> {
    let mut found = Found::default();
    for payload in Parser::new(0).parse_all(wasm) {
        payload.and_then(|payload| found.see(payload, waits)).map_err(|error| invalid(&error))?;
    }
    if found.defines_shared {
        // one for each thread, which nobody could bound, and a wait in it nobody could end
        let reason =
            "it defines a shared memory beside the one that it imports, in which its threads share nothing".into();
        return Err(LoadError::Mismatch { reason });
    }
    let Found { needed: true, types, functions, memory: Some(memory), .. } = found else { return Ok(wasm.to_vec()) };
    let mut module = Module::new();
    let mut rewriter = Rewriter { types, functions, memory, waits };
    rewriter.parse_core_module(&mut module, Parser::new(0), wasm).map_err(|error| invalid(&error))?;
    Ok(module.finish())
}

fn invalid(error: &impl std::fmt::Display) -> LoadError {
    LoadError::Invalid { reason: guest::one_line(&error.to_string()) }
}

/// What is in a module.
#[derive(Default)]
struct Found {
    types: u32,
    /// Those that are imported.
    functions: u32,
    memories: u32,
    /// The shared one.
    memory: Option<u32>,
    /// Whether there is anything to replace.
    needed: bool,
    /// Whether it has shared memories of its own.
    defines_shared: bool,
}

impl Found {
    fn see(&mut self, payload: Payload<'_>, waits: bool) -> Result<(), BinaryReaderError> {
        match payload {
            Payload::TypeSection(section) => {
                for group in section {
                    self.types += u32::try_from(group?.types().len()).expect("bounded by the module");
                }
            }
            Payload::ImportSection(section) => {
                for import in section.into_imports() {
                    match import?.ty {
                        TypeRef::Func(_) | TypeRef::FuncExact(_) => self.functions += 1,
                        TypeRef::Memory(memory) => {
                            if memory.shared {
                                self.memory = Some(self.memories);
                            }
                            self.memories += 1;
                        }
                        _ => {}
                    }
                }
            }
            Payload::MemorySection(section) => {
                for memory in section {
                    self.defines_shared |= memory?.shared;
                }
            }
            Payload::CodeSectionEntry(body) if !self.needed => {
                for operator in body.get_operators_reader()? {
                    self.needed |= replaced(&operator?, self.memory, waits).is_some();
                }
            }
            _ => {}
        }
        Ok(())
    }
}

/// The calls, in the order of their imports.
#[derive(Clone, Copy)]
enum Call {
    /// `grow(pages) -> pages before, or -1`
    Grow,
    /// `wait32(address, expected, timeout in ns, offset) -> 0, 1 or 2`
    Wait32,
    /// `wait64(address, expected, timeout in ns, offset) -> 0, 1 or 2`
    Wait64,
}

impl Call {
    const ALL: [(Self, &'static str, &'static [ValType]); CALLS as usize] = {
        use ValType::{I32, I64};
        [
            (Self::Grow, "grow", &[I32]),
            (Self::Wait32, "wait32", &[I32, I32, I64, I32]),
            (Self::Wait64, "wait64", &[I32, I64, I64, I32]),
        ]
    };
}

/// The call that stands for an instruction, and the offset that is part of that.
fn replaced(operator: &Operator<'_>, memory: Option<u32>, waits: bool) -> Option<(Call, Option<u64>)> {
    match operator {
        Operator::MemoryGrow { mem } if Some(*mem) == memory => Some((Call::Grow, None)),
        Operator::MemoryAtomicWait32 { memarg } if waits && Some(memarg.memory) == memory => {
            Some((Call::Wait32, Some(memarg.offset)))
        }
        Operator::MemoryAtomicWait64 { memarg } if waits && Some(memarg.memory) == memory => {
            Some((Call::Wait64, Some(memarg.offset)))
        }
        _ => None,
    }
}

struct Rewriter {
    types: u32,
    functions: u32,
    memory: u32,
    waits: bool,
}

const CALLS: u32 = 3;

impl Reencode for Rewriter {
    type Error = Infallible;

    fn function_index(&mut self, function: u32) -> Result<u32, Error> {
        Ok(if function < self.functions { function } else { function.saturating_add(CALLS) })
    }

    fn parse_type_section(
        &mut self,
        types: &mut TypeSection,
        section: wasmparser::TypeSectionReader<'_>,
    ) -> Result<(), Error> {
        utils::parse_type_section(self, types, section)?;
        for (_, _, parameters) in Call::ALL {
            types.ty().function(parameters.iter().copied(), [ValType::I32]);
        }
        Ok(())
    }

    fn parse_import_section(
        &mut self,
        imports: &mut ImportSection,
        section: ImportSectionReader<'_>,
    ) -> Result<(), Error> {
        utils::parse_import_section(self, imports, section)?;
        for (call, name, _) in Call::ALL {
            imports.import(MODULE, name, EntityType::Function(self.types + call as u32));
        }
        Ok(())
    }

    fn parse_function_body(&mut self, code: &mut CodeSection, body: FunctionBody<'_>) -> Result<(), Error> {
        let mut function: Function = self.new_function_with_parsed_locals(&body)?;
        for operator in body.get_operators_reader()? {
            let operator = operator?;
            match replaced(&operator, Some(self.memory), self.waits) {
                None => {
                    function.instruction(&self.instruction(operator)?);
                }
                Some((call, offset)) => {
                    if let Some(offset) = offset {
                        // one that does not fit is no valid module's
                        let offset = u32::try_from(offset).unwrap_or(u32::MAX);
                        function.instruction(&Instruction::I32Const(offset.cast_signed()));
                    }
                    function.instruction(&Instruction::Call(self.functions + call as u32));
                }
            }
        }
        code.function(&function);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use wasmparser::{Validator, WasmFeatures};

    use super::*;

    fn rewritten(wat: &str, waits: bool) -> String {
        let wasm = rewrite(&wat::parse_str(wat).expect("WAT"), waits).expect("it is valid");
        Validator::new_with_features(WasmFeatures::all()).validate_all(&wasm).expect("it stays valid");
        let mut calls = vec![];
        for payload in Parser::new(0).parse_all(&wasm) {
            if let Payload::CodeSectionEntry(body) = payload.expect("valid") {
                for operator in body.get_operators_reader().expect("valid") {
                    calls.push(match operator.expect("valid") {
                        Operator::Call { function_index } => format!("call {function_index}"),
                        Operator::I32Const { value } => format!("{value}"),
                        Operator::MemoryGrow { .. } => "grow".into(),
                        Operator::MemoryAtomicWait32 { .. } => "wait32".into(),
                        Operator::RefFunc { function_index } => format!("ref {function_index}"),
                        _ => continue,
                    });
                }
            }
        }
        calls.join(" ")
    }

    const GUEST: &str = r#"(module
        (import "a" "f" (func))
        (import "env" "memory" (memory 1 2 shared))
        (memory 1 1)
        (table 2 funcref) (elem (i32.const 0) $own 0) (elem declare func $own)
        (global funcref (ref.func $own))
        (export "own" (func $own)) (start $own)
        (func $own
            (drop (memory.grow 0 (i32.const 5)))
            (drop (memory.grow 1 (i32.const 6)))
            (drop (memory.atomic.wait32 offset=4 (i32.const 7) (i32.const 8) (i64.const -1)))
            (drop (memory.atomic.wait64 (i32.const 9) (i64.const 0) (i64.const -1)))
            (drop (ref.func $own))
            (call 0) (call $own)))"#;

    #[test]
    fn instructions_become_calls_and_functions_move_up() {
        // imports: f is 0, grow 1, wait32 2, wait64 3; $own, which was 1, is 4
        assert_eq!(rewritten(GUEST, true), "5 call 1 6 grow 7 8 4 call 2 9 0 call 3 ref 4 call 0 call 4");
        assert_eq!(rewritten(GUEST, false), "5 call 1 6 grow 7 8 wait32 9 ref 4 call 0 call 4");
    }

    #[test]
    fn what_has_nothing_to_replace_stays_as_it_is() {
        for wat in [
            r#"(module (import "env" "memory" (memory 1 2 shared)) (func (export "_start")))"#,
            r#"(module (import "env" "memory" (memory 1 2 shared)))"#,
            "(module (memory 1 2) (func (drop (memory.grow (i32.const 1)))))",
        ] {
            let wasm = wat::parse_str(wat).expect("WAT");
            assert_eq!(rewrite(&wasm, true).expect("it is valid"), wasm, "{wat}");
        }
    }

    #[test]
    fn modules_that_nobody_wrote_stay_valid() {
        let imports =
            r#"(module (import "env" "memory" (memory 1 2 shared)) (import "a" "f" (func (param i32) (result i64))))"#;
        let imports = wat::parse_str(imports).expect("WAT");
        let validate = |wasm: &[u8]| Validator::new_with_features(WasmFeatures::all()).validate_all(wasm).map(drop);
        let mut replaced = 0;
        for seed in 1..600u64 {
            // xorshift, whatever comes of it
            let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15);
            let mut bytes = vec![];
            for _ in 0..500 {
                state ^= state << 13;
                state ^= state >> 7;
                state ^= state << 17;
                bytes.extend_from_slice(&state.to_le_bytes());
            }
            let config = wasm_smith::Config {
                available_imports: Some(imports.clone()),
                threads_enabled: true,
                max_memories: 3,
                min_funcs: 3,
                ..wasm_smith::Config::default()
            };
            let Ok(module) = wasm_smith::Module::new(config, &mut arbitrary::Unstructured::new(&bytes)) else {
                continue;
            };
            let wasm = module.to_bytes();
            validate(&wasm).expect("the generator makes valid modules");
            for waits in [false, true] {
                let rewritten = match rewrite(&wasm, waits) {
                    Ok(rewritten) => rewritten,
                    Err(LoadError::Mismatch { .. }) => continue,
                    Err(error) => panic!("seed {seed}: {error}"),
                };
                validate(&rewritten).unwrap_or_else(|error| panic!("seed {seed}: {error}"));
                replaced += usize::from(waits && rewritten != wasm);
            }
        }
        assert!(replaced > 20, "only {replaced} modules had something to replace");
    }

    #[test]
    fn a_module_that_is_cut_off_is_an_error_or_as_it_was() {
        let wasm = wat::parse_str(GUEST).expect("WAT");
        for length in 8..wasm.len() {
            // never a panic
            let _ = rewrite(&wasm[..length], true);
        }
    }
}
