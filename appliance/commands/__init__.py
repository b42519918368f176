"""The commands of `hairpin`, a module for each group; `appliance.cli` puts them together."""
