"""The native room: jobs and their events, as the contract has them."""
