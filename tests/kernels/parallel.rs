//! Several processes, and processes that are killed.

use std::process::Stdio;
use std::thread;
use std::time::{Duration, Instant};

use super::{Place, guest, text};

#[test]
fn many_processes_import_one_name_while_others_use_it() {
    let place = Place::new();
    let sources = [guest("tiny/vmlinux"), guest("debian-6.1/vmlinux")];
    place.bantam(&["kernel", "import", "k", &sources[0]]);
    let start = |arguments: &[&str]| place.command(arguments).spawn().unwrap();
    let importing: Vec<_> = (0..8).map(|i| start(&["kernel", "import", "k", &sources[i % 2]])).collect();
    let using: Vec<_> = (0..20).map(|_| place.command(&["check", "--kernel", "k"]).output().unwrap()).collect();
    for output in importing.into_iter().map(|child| child.wait_with_output().unwrap()) {
        assert!(output.status.success(), "{}", text(&output.stderr));
    }
    for output in using {
        let table = text(&output.stdout);
        assert!(table.contains("  format                      ok "), "{table}{}", text(&output.stderr));
    }
    assert_eq!((place.cached(), place.list().len()), (vec!["k".to_owned()], 1));
}

#[test]
fn a_killed_process_leaves_nothing_broken() {
    let place = Place::new();
    let sources = [guest("debian-6.1/vmlinux"), guest("tiny/vmlinux")];
    let started = Instant::now();
    place.bantam(&["kernel", "import", "k", &sources[0]]);
    let whole = started.elapsed();
    for step in 0..20 {
        let mut child =
            place.command(&["kernel", "import", "k", &sources[step % 2]]).stdout(Stdio::null()).spawn().unwrap();
        thread::sleep(whole.min(Duration::from_secs(2)) * u32::try_from(step).unwrap() / 20);
        child.kill().unwrap();
        child.wait().unwrap();
        let config = place.bantam(&["run", "--kernel", "k", "--print-config"]);
        assert!(config.contains("/kernels/k/vmlinux"), "{config}");
        let table = text(&place.command(&["check", "--kernel", "k"]).output().unwrap().stdout);
        assert!(table.contains("  version "), "{table}");
    }
    // The next one clears away what they left.
    place.bantam(&["kernel", "import", "k", &sources[0]]);
    assert_eq!(place.cached(), ["k"]);
}
