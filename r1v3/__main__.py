from r1v3.cli import main

main()
