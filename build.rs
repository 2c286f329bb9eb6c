//! Compiles the guest's init, `src/init`, which bantam carries within itself: a static program without the standard
//! library, by the compiler that compiles bantam. And makes bantam small: leaves out of a release what only unwinding needs,
//! and packs relocations.

#![allow(clippy::expect_used, reason = "a build script says what went wrong by failing")]

use std::env;
use std::path::PathBuf;
use std::process::Command;

fn main() {
    init();
    leave_out_unwind_tables();
    pack_relocations();
}

/// A pointer to relocate is a bit, and not 24 bytes, where the C library knows of that (`DT_RELR`): glibc 2.36 and later.
fn pack_relocations() {
    let output = Command::new("getconf").arg("GNU_LIBC_VERSION").output();
    let version = output.map(|output| String::from_utf8_lossy(&output.stdout).into_owned()).unwrap_or_default();
    let minor = version.trim().strip_prefix("glibc 2.").and_then(|minor| minor.split('.').next()?.parse::<u32>().ok());
    if minor.is_some_and(|minor| minor >= 36) && env::var("TARGET").ok() == env::var("HOST").ok() {
        println!("cargo::rustc-link-arg-bin=bantam=-Wl,-z,pack-relative-relocs");
    }
}

/// A release without debugging information never unwinds: what tells how is a tenth of it, and left out. The precompiled
/// standard library has it in any case, and with that all that is linked.
fn leave_out_unwind_tables() {
    let is = |variable, value| env::var(variable).is_ok_and(|set| set == value);
    let is_static =
        env::var("CARGO_CFG_TARGET_FEATURE").is_ok_and(|list| list.split(',').any(|one| one == "crt-static"));
    println!("cargo::rerun-if-changed=src/no-unwind-tables.ld");
    if is("PROFILE", "release") && is("DEBUG", "false") && !is_static {
        let script =
            env::current_dir().expect("cargo starts build scripts in a folder").join("src/no-unwind-tables.ld");
        println!("cargo::rustc-link-arg-bin=bantam=-Wl,--no-eh-frame-hdr,-T,{}", script.display());
    }
}

/// Compiles the guest's init.
fn init() {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-changed=src/init");
    println!("cargo::rerun-if-changed=src/command/protocol.rs");
    let variable = |name| env::var_os(name).unwrap_or_else(|| panic!("cargo sets {name}"));
    let output = PathBuf::from(variable("OUT_DIR")).join("init");
    if env::var_os("CARGO_CFG_MIRI").is_some() {
        // Its compiler makes no programs, and no guest runs in it.
        return std::fs::write(output, []).expect("OUT_DIR can be written to");
    }
    let mut rustc = Command::new(variable("RUSTC"));
    rustc.args(["src/init/main.rs", "--edition=2024", "--crate-name=init", "--crate-type=bin"]);
    rustc.args(["-D", "unsafe_code"]);
    rustc.arg("--target").arg(variable("TARGET")).arg("-o").arg(&output);
    for option in ["panic=abort", "opt-level=s", "strip=symbols", "relocation-model=static", "codegen-units=1"] {
        rustc.args(["-C", option]);
    }
    // No start files and no C library. Of the precompiled `alloc` only what is used.
    for argument in ["-nostdlib", "-nostartfiles", "-static", "-no-pie", "-Wl,--gc-sections", "-Wl,--build-id=none"] {
        rustc.arg(format!("-Clink-arg={argument}"));
    }
    let status =
        rustc.status().unwrap_or_else(|error| panic!("cannot start the compiler for the guest's init: {error}"));
    assert!(status.success(), "cannot compile the guest's init: {status}");
}
