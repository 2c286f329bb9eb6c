//! Several processes, and processes that are killed.

use std::process::Stdio;
use std::time::{Duration, Instant};
use std::{fs, thread};

use super::{Place, add_file, assert_same};

fn large(place: &Place) -> String {
    place.archive("large.tar", |builder| {
        for i in 0..200u8 {
            add_file(builder, &format!("file-{i}"), &vec![i; 200_000]);
        }
    })
}

#[test]
fn eight_processes_make_one_image() {
    let place = Place::new();
    let source = large(&place);
    let start = || place.command(&["pull", &source]).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let running: Vec<_> = (0..8).map(|_| start()).collect();
    let ended: Vec<_> = running.into_iter().map(|child| child.wait_with_output().unwrap()).collect();
    for output in &ended {
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        assert_eq!(output.stdout, ended[0].stdout);
    }
    assert_eq!(place.cached().len(), 1);
    let image = place.pull(&source);
    assert_eq!(place.files(&image).iter().filter(|line| line.starts_with("file-")).count(), 200);
}

#[test]
fn a_killed_process_leaves_nothing_broken() {
    let place = Place::new();
    let source = large(&place);
    let started = Instant::now();
    let expected = place.files(&place.pull(&source));
    let whole = started.elapsed();
    for step in 0..20 {
        place.bantam(&["prune"]);
        let mut child = place.command(&["pull", &source]).stdout(Stdio::null()).spawn().unwrap();
        thread::sleep(whole.min(Duration::from_secs(2)) * step / 20);
        child.kill().unwrap();
        child.wait().unwrap();
        let broken = place.cached().into_iter().filter(|name| name.starts_with("sha256-"));
        for name in broken {
            // It is there, so it is whole.
            assert!(fs::metadata(place.path("cache/bantam/images").join(name).join("image.json")).is_ok());
        }
    }
    assert_same(&place.files(&place.pull(&source)), &expected);
    place.bantam(&["prune"]);
    assert_eq!(place.cached(), Vec::<String>::new());
}
