"""Other libraries' networks behind the contracts of this one."""
