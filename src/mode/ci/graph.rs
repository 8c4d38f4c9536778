//! The graph of jobs and what they need: cycles, and what is worth starting first. Pure.

use std::time::Duration;

/// A way that leads back to where it began, if there is one: each of its jobs needs the next, and the last the first.
pub(super) fn cycle(needs: &[Vec<usize>]) -> Option<Vec<usize>> {
    // whoever needs none of those that are left is taken out, until nobody can be
    let mut left: Vec<usize> = needs.iter().map(Vec::len).collect();
    let dependents = dependents(needs);
    let mut free: Vec<usize> = (0..needs.len()).filter(|at| left[*at] == 0).collect();
    while let Some(at) = free.pop() {
        for other in &dependents[at] {
            left[*other] -= 1;
            if left[*other] == 0 {
                free.push(*other);
            }
        }
    }
    // whoever is left needs somebody who is left: that way leads in a circle
    let mut way = vec![(0..needs.len()).find(|at| left[*at] > 0)?];
    let mut seen = vec![false; needs.len()];
    loop {
        let last = *way.last()?;
        seen[last] = true;
        let next = *needs[last].iter().find(|need| left[**need] > 0)?;
        if seen[next] {
            let begin = way.iter().position(|at| *at == next)?;
            return Some(way.split_off(begin));
        }
        way.push(next);
    }
}

/// Who needs each.
pub(super) fn dependents(needs: &[Vec<usize>]) -> Vec<Vec<usize>> {
    let mut dependents = vec![vec![]; needs.len()];
    for (at, needs) in needs.iter().enumerate() {
        for need in needs {
            dependents[*need].push(at);
        }
    }
    dependents
}

/// How long the longest way from each job's start to the end of all takes: what is worth starting first. The graph has no
/// cycle.
pub(super) fn critical(needs: &[Vec<usize>], durations: &[Duration]) -> Vec<Duration> {
    let dependents = dependents(needs);
    let mut left: Vec<usize> = dependents.iter().map(Vec::len).collect();
    let mut ends: Vec<usize> = (0..needs.len()).filter(|at| left[*at] == 0).collect();
    let mut after = vec![Duration::ZERO; needs.len()];
    while let Some(at) = ends.pop() {
        after[at] += durations[at];
        for need in &needs[at] {
            after[*need] = after[*need].max(after[at]);
            left[*need] -= 1;
            if left[*need] == 0 {
                ends.push(*need);
            }
        }
    }
    after
}

/// These, and all that they need.
pub(super) fn with_needs(needs: &[Vec<usize>], chosen: &[bool]) -> Vec<bool> {
    let mut with = chosen.to_vec();
    let mut open: Vec<usize> = (0..needs.len()).filter(|at| chosen[*at]).collect();
    while let Some(at) = open.pop() {
        for need in &needs[at] {
            if !std::mem::replace(&mut with[*need], true) {
                open.push(*need);
            }
        }
    }
    with
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cycle_is_found_wherever_it_is() {
        assert_eq!(cycle(&[]), None);
        assert_eq!(cycle(&[vec![], vec![0], vec![0, 1]]), None);
        assert_eq!(cycle(&[vec![0]]), Some(vec![0]));
        let found = cycle(&[vec![1], vec![2], vec![3], vec![1], vec![]]).expect("a cycle");
        assert_eq!(found, [1, 2, 3]);
        // who only leads there is not part of it
        assert_eq!(cycle(&[vec![1], vec![1]]), Some(vec![1]));
    }

    #[test]
    fn the_longest_way_comes_first() {
        let seconds = |all: &[u64]| all.iter().map(|s| Duration::from_secs(*s)).collect::<Vec<_>>();
        // 0 <- 1 <- 2, and 3 alone
        let needs = [vec![], vec![0], vec![1], vec![]];
        assert_eq!(critical(&needs, &seconds(&[1, 2, 3, 4])), seconds(&[6, 5, 3, 4]));
        // a long chain does not overflow the stack
        let chain: Vec<Vec<usize>> = (0..100_000usize).map(|at| at.checked_sub(1).into_iter().collect()).collect();
        assert_eq!(critical(&chain, &vec![Duration::from_secs(1); 100_000])[0], Duration::from_secs(100_000));
        assert_eq!(cycle(&chain), None);
    }

    #[test]
    fn what_is_needed_comes_with_who_needs_it() {
        let needs = [vec![], vec![0], vec![1], vec![]];
        assert_eq!(with_needs(&needs, &[false, false, true, false]), [true, true, true, false]);
        assert_eq!(with_needs(&needs, &[true, false, false, false]), [true, false, false, false]);
    }
}
