"""The command line: parse, call one function and print. Computation belongs in the other folders."""
