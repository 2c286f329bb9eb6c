//! Users and groups: numbers, or names that the guest's /etc/passwd and /etc/group have.

use alloc::borrow::ToOwned;
use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;

/// Who runs the command.
#[derive(Debug, PartialEq, Eq)]
pub struct Account {
    pub user: u32,
    pub group: u32,
    /// The other groups that the user is a member of.
    pub groups: Vec<u32>,
    pub home: Vec<u8>,
}

/// Finds out who `wanted` is: `USER` or `USER:GROUP`. Without a group it is the user's own, and then also those that the
/// user is a member of.
pub fn find(wanted: &[u8], passwd: &[u8], group: &[u8]) -> Result<Account, String> {
    let (user, wanted_group) = match wanted.iter().position(|byte| *byte == b':') {
        Some(colon) => (&wanted[..colon], Some(&wanted[colon + 1..])),
        None => (wanted, None),
    };
    let number = parse(user);
    let entry = passwd
        .split(|byte| *byte == b'\n')
        .map(fields)
        .find(|fields| fields.len() >= 4 && (fields[0] == user || number.is_some() && parse(fields[2]) == number));
    let known = entry.as_ref().and_then(|fields| Some((parse(fields[2])?, parse(fields[3])?)));
    let (id, own_group) = match (known, number) {
        (Some(known), _) => known,
        (None, Some(number)) => (number, 0),
        (None, None) => return Err(format!("there is no user `{}` in /etc/passwd", String::from_utf8_lossy(user))),
    };
    let home = entry.as_ref().and_then(|fields| fields.get(5)).filter(|home| !home.is_empty());
    let home = home.map_or(&b"/"[..], |home| home).to_owned();
    let all = || group.split(|byte| *byte == b'\n').map(fields).filter(|fields| fields.len() >= 3);
    if let Some(wanted) = wanted_group.filter(|wanted| !wanted.is_empty()) {
        let known = || all().find(|fields| fields[0] == wanted).and_then(|fields| parse(fields[2]));
        let found = parse(wanted).or_else(known);
        let none = || format!("there is no group `{}` in /etc/group", String::from_utf8_lossy(wanted));
        return Ok(Account { user: id, group: found.ok_or_else(none)?, groups: Vec::new(), home });
    }
    let name = entry.as_ref().map_or(user, |fields| fields[0]);
    let member = |fields: &Vec<&[u8]>| {
        fields.get(3).is_some_and(|members| members.split(|byte| *byte == b',').any(|member| member == name))
    };
    let groups = all().filter(member).filter_map(|fields| parse(fields[2])).collect();
    Ok(Account { user: id, group: own_group, groups, home })
}

fn fields(line: &[u8]) -> Vec<&[u8]> {
    line.split(|byte| *byte == b':').collect()
}

fn parse(text: &[u8]) -> Option<u32> {
    core::str::from_utf8(text).ok()?.parse().ok()
}
