//! Machines that are saved while they run.

use super::*;

#[test]
fn a_guest_goes_on_while_it_is_saved_as_it_was() {
    let lab = Lab::new(Kernel::Tiny, COUNTER.replace("exec 9>/dev/vda", "exec 9>/count").as_str());
    let (full, diff) = (lab.path("full"), lab.path("diff"));
    let first = Running::start(Builder::new(lab.config.clone()));
    let mut noise = None;
    let mut goes_on = |machine: Running, destination: Destination, folder: &Path| {
        let before = machine.screen.wait_until(|seen| counts(seen).len() > 2);
        let noise = noise.get_or_insert_with(|| values(&before, "noise")[0].to_owned());
        machine.handle.snapshot(destination).unwrap();
        let after = machine.screen.wait_until(|seen| counts(seen).len() > counts(&before).len() + 12);
        assert!(counts(&after).windows(2).all(|two| two[1] == two[0] + 1), "{after}");
        machine.stop();
        // What is restored goes on from where it was saved, not from where it went after that.
        let again = Running::restore(folder);
        let text = again.screen.wait_until(|seen| values(seen, "noise").len() > 1);
        let (from, to) = (*counts(&before).last().unwrap(), *counts(&after).last().unwrap());
        assert!((from..to).contains(&(counts(&text)[0] - 1)), "{before} {text}");
        assert!(counts(&text).windows(2).all(|two| two[1] == two[0] + 1), "{text}");
        assert!(values(&text, "noise").iter().all(|seen| seen == noise), "{text}");
        again
    };
    let again = goes_on(first, Destination::Folder(full.clone()), &full);
    goes_on(again, Destination::Diff(diff.clone()), &diff).stop();
}
