//! The initrd of a guest that boots.

use std::ops::Range;
use std::sync::mpsc::{self, TryRecvError};

use super::working_set::Helper;
use crate::memory::{self, GuestRam};

/// How much of it is made the machine's own at once.
const PIECE: u64 = 4 << 20;

/// Has the initrd, which is mapped from its file, become the machine's own, on a thread: the host may have to read it.
///
/// Linux writes all of its initrd as it frees it. Each page that is the machine's own by then saves the guest two faults of
/// three: one that maps what others have as well, and one that takes that away again.
pub fn own(ram: &GuestRam, initrd: Range<u64>) -> Option<Helper> {
    if initrd.is_empty() {
        return None;
    }
    let (stop, stopped) = mpsc::channel();
    let ram = ram.clone();
    let work = move || {
        let mut start = initrd.start;
        while start < initrd.end && stopped.try_recv() == Err(TryRecvError::Empty) {
            let end = initrd.end.min(start + PIECE);
            if let Err(error) = memory::own(&ram, start..end) {
                return log::debug!("the initrd stays shared: {error}");
            }
            start = end;
        }
    };
    let spawned = crate::threads::named("bantam-initrd".into()).spawn(work);
    spawned.map_err(|error| log::debug!("the initrd stays shared: {error}")).ok().map(|thread| (stop, thread))
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::unix::fs::FileExt;

    use vm_memory::{Bytes, GuestAddress};

    use super::*;

    #[test]
    fn an_initrd_becomes_the_machines_own() {
        let file: File = tempfile::tempfile().unwrap();
        let len = PIECE + 0x2000;
        file.write_all_at(&vec![7; usize::try_from(len).unwrap()], 0).unwrap();
        let ram = memory::reserve(&[0..16 << 20]).unwrap();
        memory::map_file(&ram, 0x1000, &file, 0, len).unwrap();
        let (_stop, thread) = own(&ram, 0x1000..0x1000 + len).unwrap();
        thread.join().unwrap();
        file.write_all_at(&vec![0; usize::try_from(len).unwrap()], 0).unwrap();
        for at in (0x1000..0x1000 + len).step_by(0x1000) {
            assert_eq!(ram.read_obj::<u8>(GuestAddress(at)).unwrap(), 7, "{at:#x}");
        }
        assert!(own(&ram, 0..0).is_none());
    }
}
