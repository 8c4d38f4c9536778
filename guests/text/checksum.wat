;; The checksum of a chunk, in no language but WebAssembly's own: what `guests/windows/src/checksum.rs` does without
;; `--reduce`, as a whole guest that `wrun threads --input FILE --chunk 1MiB checksum.wat` runs as it is.
;;
;; It shows all that a guest of any language needs for a window: a region of its memory whose address is, modulo 64 KiB, the
;; same as the offset in the buffer, and two calls.
(component
  (import "wrun:guest/window@0.1.0" (instance $window
    (type $error' (enum "no-such-buffer" "out-of-range" "misaligned" "overlaps" "taken" "too-many" "not-attached" "no-room"))
    (export "window-error" (type $error (eq $error')))
    (export "attach" (func
      (param "name" string) (param "offset" u64) (param "region" (list u8)) (result (result u32 (error $error)))))
    (export "detach" (func (param "window" u32) (result (result (error $error)))))))

  (core module $memory (memory (export "memory") 40))
  (core instance $memory (instantiate $memory))
  (alias core export $memory "memory" (core memory $bytes))
  (alias export $window "attach" (func $attach))
  (alias export $window "detach" (func $detach))
  (core func $attach (canon lower (func $attach) (memory $bytes)))
  (core func $detach (canon lower (func $detach) (memory $bytes)))

  (core module $main
    (import "host" "memory" (memory 40))
    (import "host" "attach" (func $attach (param i32 i32 i64 i32 i32 i32)))
    (import "host" "detach" (func $detach (param i32 i32)))

    ;; 0: what calls answer; 64: texts; 4096: the message; 8192: the reply; 131072 and on: the window
    (data (i32.const 64) "input")
    (data (i32.const 80) "{\"adler32\":")
    (data (i32.const 96) ",\"bytes\":")
    (data (i32.const 112) "\"expected a chunk of at most 2 MiB of the buffer `input`\"")

    ;; where the host puts the message: there is one at a time
    (func (export "realloc") (param i32 i32 i32 i32) (result i32)
      (if (i32.gt_u (local.get 3) (i32.const 4096)) (then unreachable))
      (i32.const 4096))

    ;; the number behind the first key that begins with this letter
    (func $number (param $at i32) (param $end i32) (param $letter i32) (result i64)
      (local $value i64)
      (loop $search
        (if (i32.ge_u (local.get $at) (local.get $end)) (then (return (i64.const -1))))
        (local.set $at (i32.add (local.get $at) (i32.const 1)))
        (br_if $search (i32.ne (i32.load16_u (local.get $at))
          (i32.or (i32.const 0x22) (i32.shl (local.get $letter) (i32.const 8))))))
      (loop $colon
        (local.set $at (i32.add (local.get $at) (i32.const 1)))
        (br_if $colon (i32.ne (i32.load8_u (local.get $at)) (i32.const 0x3a))))
      (loop $digits
        (local.set $at (i32.add (local.get $at) (i32.const 1)))
        (if (i32.lt_u (i32.sub (i32.load8_u (local.get $at)) (i32.const 0x30)) (i32.const 10))
          (then
            (local.set $value (i64.add
              (i64.mul (local.get $value) (i64.const 10))
              (i64.extend_i32_u (i32.sub (i32.load8_u (local.get $at)) (i32.const 0x30)))))
            (br $digits))))
      (local.get $value))

    ;; writes the digits of a number, and answers their end
    (func $write (param $at i32) (param $value i64) (result i32)
      (if (i64.ge_u (local.get $value) (i64.const 10))
        (then (local.set $at (call $write (local.get $at) (i64.div_u (local.get $value) (i64.const 10))))))
      (i32.store8 (local.get $at) (i32.add (i32.const 0x30) (i32.wrap_i64 (i64.rem_u (local.get $value) (i64.const 10)))))
      (i32.add (local.get $at) (i32.const 1)))

    (func $adler32 (param $at i32) (param $end i32) (result i32)
      (local $a i32) (local $b i32)
      (local.set $a (i32.const 1))
      (block $done
        (loop $next
          (br_if $done (i32.ge_u (local.get $at) (local.get $end)))
          (local.set $a (i32.rem_u (i32.add (local.get $a) (i32.load8_u (local.get $at))) (i32.const 65521)))
          (local.set $b (i32.rem_u (i32.add (local.get $b) (local.get $a)) (i32.const 65521)))
          (local.set $at (i32.add (local.get $at) (i32.const 1)))
          (br $next)))
      (i32.or (i32.shl (local.get $b) (i32.const 16)) (local.get $a)))

    ;; what `handle` answers: `result<option<json>, json>`, 16 bytes at 0
    (func $failed (result i32)
      (i32.store (i32.const 0) (i32.const 1))
      (i32.store (i32.const 4) (i32.const 112))
      (i32.store (i32.const 8) (i32.const 57))
      (i32.const 0))

    (func (export "handle") (param $message i32) (param $size i32) (result i32)
      (local $offset i64) (local $length i64) (local $at i32) (local $end i32) (local $sum i32)
      (local.set $offset (call $number (local.get $message) (i32.add (local.get $message) (local.get $size)) (i32.const 0x6f)))
      (local.set $length (call $number (local.get $message) (i32.add (local.get $message) (local.get $size)) (i32.const 0x6c)))
      (if (i64.gt_u (local.get $length) (i64.const 0x200000)) (then (return (call $failed))))
      (local.set $at (i32.add (i32.const 131072) (i32.wrap_i64 (i64.and (local.get $offset) (i64.const 0xffff)))))
      (local.set $end (i32.add (local.get $at) (i32.wrap_i64 (local.get $length))))
      (call $attach
        (i32.const 64) (i32.const 5) (local.get $offset) (local.get $at) (i32.wrap_i64 (local.get $length)) (i32.const 0))
      (if (i32.load8_u (i32.const 0)) (then (return (call $failed))))
      (local.set $sum (call $adler32 (local.get $at) (local.get $end)))
      (call $detach (i32.load (i32.const 4)) (i32.const 16))
      (memory.copy (i32.const 8192) (i32.const 80) (i32.const 11))
      (local.set $at (call $write (i32.const 8203) (i64.extend_i32_u (local.get $sum))))
      (memory.copy (local.get $at) (i32.const 96) (i32.const 9))
      (local.set $at (call $write (i32.add (local.get $at) (i32.const 9)) (local.get $length)))
      (i32.store8 (local.get $at) (i32.const 0x7d))
      (i32.store (i32.const 0) (i32.const 0))
      (i32.store (i32.const 4) (i32.const 1))
      (i32.store (i32.const 8) (i32.const 8192))
      (i32.store (i32.const 12) (i32.sub (i32.add (local.get $at) (i32.const 1)) (i32.const 8192)))
      (i32.const 0)))

  (core instance $main (instantiate $main (with "host" (instance
    (export "memory" (memory $bytes))
    (export "attach" (func $attach))
    (export "detach" (func $detach))))))

  (alias core export $main "handle" (core func $handle))
  (alias core export $main "realloc" (core func $realloc))
  (func $handle (param "message" string) (result (result (option string) (error string)))
    (canon lift (core func $handle) (memory $bytes) (realloc $realloc)))
  (instance $handler (export "handle" (func $handle)))
  (export "wrun:guest/handler@0.1.0" (instance $handler)))
