// Runs one program as a module; prints the vectors that it exports, or the error that it throws.
const [program] = process.argv.slice(2);
console.log = () => {};
const outcome = await import(program).then(
  ({ vectors }) => ({ vectors }),
  (error) => ({ error: { type: error.constructor.name, message: error.message } }),
);
process.stdout.write(JSON.stringify(outcome) + "\n");
